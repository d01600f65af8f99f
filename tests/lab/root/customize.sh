#!/bin/sh
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Runs in the new root file system once its packages and the overlay are in place.
set -eu

echo lab > /etc/hostname
# Where the initramfs mounts the modules of the kernel that is booted
mkdir -p /usr/lib/modules

# Two plain users: one whose processes hold VFIO devices, and somebody else.
useradd --uid 1001 --create-home --shell /bin/bash vm
useradd --uid 1002 --create-home --shell /bin/bash alice

# What waits or works at boot and has nothing to do in a guest that lives for an hour; and every timer of the calendar,
# since days have passed for a guest that is restored.
systemctl mask --quiet \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer logrotate.timer man-db.timer systemd-networkd-wait-online.service getty@tty1.service \
    serial-getty@ttyS0.service serial-getty@ttyAMA0.service libvirt-guests.service
systemctl enable --quiet systemd-networkd.service ssh.service
# libvirt is started by its sockets, when somebody asks for it. Disabling its service disables them too.
if [ -e /usr/lib/systemd/system/libvirtd.service ]; then
    systemctl disable --quiet libvirtd.service
    systemctl enable --quiet libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket virtlogd.socket
fi

# Otherwise apparmor.service compiles every profile of the distribution before SSH may start: a minute under emulation.
for profile in /etc/apparmor.d/*; do
    case ${profile##*/} in
        usr.sbin.libvirtd | usr.lib.libvirt.virt-aa-helper) continue ;;
    esac
    [ -f "$profile" ] && ln -s "$profile" /etc/apparmor.d/disable/
done

# A first boot would set presets, make an id and rebuild what is up to date.
systemd-machine-id-setup
touch /etc/.updated /var/.updated
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
