#!/bin/sh
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Runs in a throw-away chroot that has Debian's kernel, its headers and its source: builds the modules that Debian leaves
# out, for exactly that kernel, and puts what a guest is booted from into /out.
#   make.sh CONTAINER   whose /dev/vfio/vfio is: `legacy` (VFIO's own container) or `iommufd`
#   make.sh CONTAINER ARCHITECTURE TRIPLET FLAVOUR   for another architecture, whose compiler TRIPLET-gcc is installed
set -eu
container=$1 architecture=${2:-} triplet=${3:-} flavour=${4:-}

fail() {
    echo "make.sh: $*" >&2
    exit 1
}

only() {
    [ $# = 1 ] || fail "there should be one of these: $*"
    printf '%s\n' "$1"
}

# Packages of another architecture are only unpacked: the headers want a compiler that runs there. What they have of
# programs is in packages of their own, which run here.
if [ -n "$architecture" ]; then
    packages=$(apt-cache show --no-all-versions "linux-image-$flavour:$architecture" \
        "linux-headers-$flavour:$architecture" | sed -n "s/^Depends: \\([^ ]*\\).*/\\1:$architecture/p")
    base=$(echo "$packages" | sed -n "s/^linux-image-\\(.*\\)-$flavour:.*/\\1/p")
    apt-get install --quiet --yes --no-install-recommends linux-base "linux-kbuild-$base" "linux-headers-$base-common"
    mkdir /packages
    # shellcheck disable=SC2086 # the names of several
    (cd /packages && apt-get download --quiet $packages "busybox-static:$architecture")
    dpkg --unpack --force-depends /packages/*.deb
fi

release=$(basename "$(only /lib/modules/*)")
# As the package itself does when it is configured
[ -z "$architecture" ] || depmod "$release"
headers=/usr/src/linux-headers-$release
source=$(only /usr/src/linux-source-*.tar.xz)

# A module is built for one kernel only: made from another's source it may load, and read the wrong fields.
version() {
    dpkg-query --show --showformat='${Version}' "$1"
}
kernel=$(version "linux-image-$release")
for package in "linux-headers-$release" "$(basename "$source" .tar.xz)"; do
    [ "$(version "$package")" = "$kernel" ] ||
        fail "versions differ: linux-image-$release is $kernel, $package is $(version "$package")"
done

mkdir /out /build
cd /build
tar -xf "$source" --strip-components=1 --wildcards \
    '*/drivers/iommu/iommufd' '*/drivers/iommu/*.h' '*/drivers/vfio' '*/lib/interval_tree.c' \
    '*/include/uapi/linux/iommufd.h' '*/include/uapi/linux/vfio.h'

# The one thing of the kernel's image that iommufd needs, and that a kernel without it lacks
{
    echo '#include <linux/interval_tree.h>'
    echo '#include <linux/module.h>'
    sed -n '/^#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER/,/^#endif/p' lib/interval_tree.c
} > drivers/iommu/iommufd/span_iter.c
echo 'iommufd-y += span_iter.o' >> drivers/iommu/iommufd/Makefile

# What the configuration would say. The kernel's headers define what Debian has set, so what must be off is undone.
on='-DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_VFIO_DEVICE_CDEV=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1'
set -- CONFIG_IOMMUFD=m CONFIG_VFIO_DEVICE_CDEV=y CONFIG_VFIO_MDEV= CONFIG_DEBUG_INFO_BTF_MODULES=
changed='IOMMUFD=m VFIO_DEVICE_CDEV=y'
if [ "$container" = iommufd ]; then
    printf '#undef CONFIG_%s\n' VFIO_CONTAINER VFIO_IOMMU_TYPE1 VFIO_IOMMU_TYPE1_MODULE > off.h
    on="$on -DCONFIG_IOMMUFD_VFIO_CONTAINER=1 -include /build/off.h"
    set -- "$@" CONFIG_IOMMUFD_VFIO_CONTAINER=y CONFIG_VFIO_CONTAINER= CONFIG_VFIO_IOMMU_TYPE1=
    changed="$changed IOMMUFD_VFIO_CONTAINER=y VFIO_CONTAINER=n VFIO_IOMMU_TYPE1=n"
fi

build() {
    folder=$1
    shift
    make -j"$(nproc)" -C "$headers" M="/build/$folder" KCFLAGS="$on" "$@" \
        ${triplet:+"ARCH=$architecture" "CROSS_COMPILE=$triplet-"} modules
}
build drivers/iommu/iommufd "$@"
build drivers/vfio "$@" KBUILD_EXTRA_SYMBOLS=/build/drivers/iommu/iommufd/Module.symvers

# The modules as packaged, for a host without iommufd, and those with the new ones in the place of Debian's VFIO.
mkdir -p /out/packaged /out/lab
cp -a "/lib/modules/$release" /out/packaged/
# Links into the headers, which will be gone
rm -f "/out/packaged/$release/build" "/out/packaged/$release/source"
cp "/boot/config-$release" "/out/packaged/$release/config"
cp -al "/out/packaged/$release" /out/lab/
rm -r "/out/lab/$release/kernel/drivers/vfio" "/out/lab/$release/config"
mkdir "/out/lab/$release/updates"
find drivers -name '*.ko' -exec cp -t "/out/lab/$release/updates" {} +
"${triplet:+$triplet-}strip" --strip-debug "/out/lab/$release/updates/"*.ko
names=$(echo "$changed" | sed 's/=[a-z]*//g; s/ /|/g')
{
    grep -Ev "^(# )?CONFIG_($names)[= ]" "/boot/config-$release"
    for each in $changed; do
        case $each in
            *=n) echo "# CONFIG_${each%=n} is not set" ;;
            *) echo "CONFIG_$each" ;;
        esac
    done
} > "/out/lab/$release/config"
# depmod puts new files in the place of its old ones, so the packaged ones, with which they are shared, stay.
mkdir -p /tmp/base/lib
ln -s /out/lab /tmp/base/lib/modules
depmod --basedir /tmp/base "$release"

# The initramfs holds what leads to the disks and nothing else: an emulated processor has to unpack it.
initramfs=/tmp/initramfs
mkdir -p "$initramfs/bin" "$initramfs/modules"
cp /bin/busybox "$initramfs/bin/"
ln -s busybox "$initramfs/bin/sh"
cp /init "$initramfs/init"
chmod 755 "$initramfs/init"
# In the order in which they must be loaded
for module in virtio_pci virtio_blk ext4; do
    modprobe --set-version "$release" --show-depends "$module"
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++ { printf "%02d %s\n", NR, $0 }' |
    while read -r number file; do
        case $file in
            *.xz) unpack='xz -dc' ;;
            *.zst) unpack='zstd -dc' ;;
            *) unpack='cat' ;;
        esac
        $unpack "$file" > "$initramfs/modules/$number.ko"
    done
[ -e "$initramfs/modules/01.ko" ] || fail "no module leads to the disks"
(cd "$initramfs" && find . | sort | cpio --quiet --create --format=newc --owner=0:0) > /out/initrd.img

cp "/boot/vmlinuz-$release" /out/vmlinuz
mkdir -p /out/include/linux
cp include/uapi/linux/iommufd.h include/uapi/linux/vfio.h /out/include/linux/
printf '%s\n' "$release" > /out/release
printf '%s\n' "$kernel" > /out/version
