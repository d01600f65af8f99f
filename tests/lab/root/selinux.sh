#!/bin/sh
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Runs after customize.sh where SELinux is to be in force, and lays the system out as Red Hat's family does.
set -eu

sed -i 's/^SELINUX=.*/SELINUX=enforcing/' /etc/selinux/config
semodule --noreload --install=/selinux.cil
rm /selinux.cil

# The policy does not let it work, and the kernel's command line configures no network here.
systemctl mask --quiet systemd-network-generator.service

# The emulator is a file of its own there, and no other is installed. Upgrades follow it.
mkdir -p /usr/libexec
dpkg-divert --quiet --local --rename --divert /usr/libexec/qemu-kvm --add /usr/bin/qemu-system-x86_64
rm -f /usr/bin/kvm /usr/bin/qemu-system-*

useradd --system --user-group --no-create-home --home-dir / --shell /usr/sbin/nologin --groups kvm qemu
printf '%s\n' 'user = "qemu"' 'group = "qemu"' >> /etc/libvirt/qemu.conf
