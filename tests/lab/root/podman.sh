#!/bin/sh
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Podman does nothing but what it is told: not at boot, not by a timer, and not each time that systemd reads its units.
set -eu

systemctl mask --quiet \
    podman-auto-update.timer podman-auto-update.service podman-clean-transient.service podman-restart.service \
    podman.socket podman.service netavark-dhcp-proxy.socket
systemctl --global mask --quiet \
    podman-auto-update.timer podman-auto-update.service podman-clean-transient.service podman-restart.service \
    podman.socket podman.service
mkdir -p /etc/systemd/system-generators /etc/systemd/user-generators
ln -s /dev/null /etc/systemd/system-generators/podman-system-generator
ln -s /dev/null /etc/systemd/user-generators/podman-user-generator

grep --with-filename alice /etc/subuid /etc/subgid
