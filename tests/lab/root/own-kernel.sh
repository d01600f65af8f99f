#!/bin/sh
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Runs after customize.sh in a root file system that is booted with the distribution's kernel.
set -eu

# Its modules are in the file system; there is no disk with others, and the boot would wait for it.
sed -i '/LABEL=modules/d' /etc/fstab

# Only what leads to the root file system, lest a big initramfs be unpacked by an emulated processor at each boot.
printf 'MODULES=list\n' > /etc/initramfs-tools/conf.d/lab
printf '%s\n' virtio_pci virtio_blk ext4 >> /etc/initramfs-tools/modules
update-initramfs -u -k all
