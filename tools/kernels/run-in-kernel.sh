#!/usr/bin/env bash
# Run a command under another Linux kernel, in QEMU, and pass its exit status back.
#
#   run-in-kernel.sh KERNEL COMMAND [ARG...]
#   run-in-kernel.sh 6.1  python3 /src/tests/test_probe.py
#   run-in-kernel.sh 6.1  'cd /src && pytest -q tests/probe'     # one argument: a bash line
#
# KERNEL   5.10 | 6.1 | 6.1-rt | 6.12 | 6.12-rt | 6.18 | newest     (Debian packages; see `kernels` below)
#
# In the guest:  /src  the folder SRC, over an overlay: writes are thrown away
#                /out  the folder OUT, read-write: put results there
#                /     a Debian 12 tree (BCC, strace, gcc, PIP), thrown away after the run
#                /lib/modules/$(uname -r)/build  that kernel's own headers (6.18: those of 6.12, see below)
# Exit status:   the command's; 124 after TIMEOUT; 125 if the guest died before the command ended.
#
# Environment:   SRC (default: git top level or $PWD)   OUT (default: a new folder under $CACHE)
#                CPUS=2  MEMORY=2048 (MiB)  TIMEOUT=900 (s)  APPEND="kernel parameters"
#                CACHE (default ~/.cache/kprobe-kernels)   PIP="..." (wheels for the guest tree: what the probe and its tests import)
#                QEMU=qemu-system-x86_64  CPU=Nehalem  QEMU_ACCEL=tcg,thread=single
#                (QEMU_ACCEL=kvm CPU=host where KVM runs unmodified guests: not on the VMs this was written on)
#
# Needs root and: apt-get install --no-install-recommends qemu-system-x86 seabios mmdebstrap zstd xz-utils kmod \
#                e2fsprogs cpio python3-pip
# The first call of a kernel downloads and unpacks it (about 20 s); the first call ever builds the guest tree.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${CACHE:-$HOME/.cache/kprobe-kernels}
CPUS=${CPUS:-2} MEMORY=${MEMORY:-2048} TIMEOUT=${TIMEOUT:-900} APPEND=${APPEND:-}
# One thread for all vCPUs: with one each, guests hung or died at an int3 while they patched their own code.
QEMU_ACCEL=${QEMU_ACCEL:-tcg,thread=single}
PIP=${PIP-numpy pyarrow orjson pydantic pydantic-settings pyyaml typer rich zstandard prometheus-client psutil confluent-kafka pytest pytest-timeout}
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

die() { echo "run-in-kernel: $*" >&2; exit 125; }

# name -> pattern of the package's kernel release; apt picks the newest release that matches.
kernels() {
    case $1 in
        5.10)    echo '5\.10\.0-[0-9]+-amd64' ;;
        6.1)     echo '6\.1\.0-[0-9]+-amd64' ;;
        6.1-rt)  echo '6\.1\.0-[0-9]+-rt-amd64' ;;
        6.12)    echo '6\.12\.[0-9]+\+deb12-amd64' ;;
        6.12-rt) echo '6\.12\.[0-9]+\+deb12-rt-amd64' ;;
        6.18)    echo '6\.18\.[0-9]+\+deb13-amd64' ;;
        newest)  echo '[0-9]+\.[0-9]+\.[0-9]+\+deb13-amd64' ;;      # backports: 7.3.4 when written
        *) die "unknown kernel '$1': choose 5.10, 6.1, 6.1-rt, 6.12, 6.12-rt, 6.18 or newest" ;;
    esac
}

# A private apt that knows more suites than the host does; the host's own apt stays as it is.
# The mirror is the one that the host is configured with.
private_apt() {
    local apt=$CACHE/apt mirror security
    export APT_CONFIG=$apt/apt.conf
    [ -n "$(find "$apt/updated" -mtime -1 2>/dev/null)" ] && return
    mirror=$(env -u APT_CONFIG apt-get indextargets --format '$(SITE)' 'Codename: bookworm' | sort -u | head -1)
    security=$(env -u APT_CONFIG apt-get indextargets --format '$(SITE)' 'Codename: bookworm-security' | sort -u | head -1)
    [ -n "$mirror" ] && [ -n "$security" ] || die "no Debian mirror in the host's apt sources"
    mkdir -p "$apt"/{lists/partial,archives/partial}
    for suite in bullseye bookworm trixie; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $security $suite-security main"
        [ $suite = bullseye ] ||   # its backports have left the mirrors
            echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite-backports main"
    done > "$apt/sources.list"
    cat > "$apt/apt.conf" <<-CONF
	Dir::Etc::sourcelist "$apt/sources.list";
	Dir::Etc::sourceparts "-";
	Dir::State::lists "$apt/lists";
	Dir::Cache "$apt";
	Dir::Cache::pkgcache "pkgcache.bin";
	Dir::Cache::srcpkgcache "srcpkgcache.bin";
	Acquire::Languages "none";
	APT::Sandbox::User "root";
	CONF
    apt-get -qq update
    touch "$apt/updated"
}

# Unpacks (does not install) image, modules and headers of one kernel; makes what the run needs:
#   vmlinux        uncompressed ELF, entered through PVH: no slow decompression in the emulator
#   initramfs.gz   busybox and the modules needed to reach the root disk
#   kernel.ext4    /lib/modules/RELEASE and /usr/src/linux-headers-*
fetch_kernel() {
    local name=$1 dir=$CACHE/$1 release unpack p
    [ -e "$dir/ready" ] && return
    local pattern; pattern=$(kernels "$name")
    private_apt
    release=$(apt-cache search --names-only "^linux-image-$pattern\$" | awk '{print $1}' |
              sed 's/^linux-image-//' | sort -V | tail -1)
    [ -n "$release" ] || die "no package linux-image-$pattern in the configured suites"
    echo "run-in-kernel: fetching $release" >&2
    rm -rf "$dir"; mkdir -p "$dir/debs"; unpack=$dir/tree
    local abi=${release%-amd64}; abi=${abi%-rt}
    local re="${release//[.+]/\\&} ${abi//[.+]/\\&}"; set -- $re
    # 7.x splits the image in three, and some releases have no headers any more: take what is there
    apt-cache search --names-only "^linux-(image|binary|modules|headers)-($1|$2-common(-rt)?)\$" |
        awk '{print $1}' > "$dir/packages"
    (cd "$dir/debs" && xargs apt-get -qq download < "$dir/packages")
    if ! grep -q '^linux-headers' "$dir/packages"; then
        # mismatched headers do for tracepoint programs; fields of kernel structures may lie elsewhere
        set -- $(apt-cache search --names-only '^linux-headers-6\.12\.[0-9]+\+deb12-(amd64|common)$' |
                 awk '{print $1}' | sort -V | tail -2)
        echo "run-in-kernel: no headers are published for $release, taking $*" >&2
        (cd "$dir/debs" && apt-get -qq download "$@")
    fi
    for p in "$dir"/debs/*.deb; do dpkg-deb -x "$p" "$unpack"; done
    mkdir -p "$unpack/lib/modules"    # Debian 13 packages use /usr/lib/modules
    [ ! -d "$unpack/usr/lib/modules" ] || cp -al "$unpack/usr/lib/modules/." "$unpack/lib/modules/"
    depmod -b "$unpack" "$release"
    local image; image=$(find "$unpack/boot" "$unpack/lib/modules" -name 'vmlinuz*' 2>/dev/null | head -1 || true)
    extract_vmlinux "$image" "$dir/vmlinux" || cp "$image" "$dir/vmlinux"
    make_initramfs "$unpack" "$release" "$dir/initramfs.gz"
    mkdir -p "$dir/img/modules" "$dir/img/src"
    mv "$unpack/lib/modules/$release" "$dir/img/modules/"
    [ ! -d "$unpack/usr/src" ] || mv "$unpack"/usr/src/* "$dir/img/src/"
    # 7.x uses relative links to the headers; make all of them absolute, as they are installed
    local l t
    for l in build source; do
        t=$dir/img/modules/$release/$l
        [ ! -L "$t" ] || ln -sfn "/usr/src/$(basename "$(readlink "$t")")" "$t"
    done
    if [ ! -e "$dir/img/src/linux-headers-$release" ]; then
        for p in "$dir"/img/src/linux-headers-*; do
            case $p in *-common) l=source ;; *) l=build ;; esac
            ln -sfn "/usr/src/$(basename "$p")" "$dir/img/modules/$release/$l"
        done
    fi
    mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -d "$dir/img" "$dir/kernel.ext4" \
        $(( $(du -sm "$dir/img" | cut -f1) * 115 / 100 + 64 ))M >/dev/null
    rm -rf "$unpack" "$dir/img" "$dir/debs"
    echo "$release" > "$dir/ready"
}

extract_vmlinux() {   # bzImage -> ELF; the payload is the first stream that unpacks to an ELF file
    python3 - "$1" "$2" <<'PY'
import lzma, subprocess, sys, zlib
image = open(sys.argv[1], "rb").read()
unpackers = {
    b"\xfd7zXZ\x00": lambda d: lzma.LZMADecompressor().decompress(d),
    b"\x1f\x8b\x08": lambda d: zlib.decompressobj(31).decompress(d),
    b"\x28\xb5\x2f\xfd": lambda d: subprocess.run(["zstd", "-dcq"], input=d, capture_output=True).stdout,
    b"\x02\x21\x4c\x18": lambda d: subprocess.run(["lz4", "-dc"], input=d, capture_output=True).stdout,
}
for magic, unpack in unpackers.items():
    at = -1
    while (at := image.find(magic, at + 1)) >= 0:
        try:
            elf = unpack(image[at:])
        except Exception:  # a chance match of the magic bytes
            continue
        if elf[:4] == b"\x7fELF":
            open(sys.argv[2], "wb").write(elf)
            sys.exit(0)
sys.exit(1)
PY
}

make_initramfs() {
    local tree=$1 release=$2 out=$3 work ko
    work=$(mktemp -d); mkdir -p "$work"/{bin,lib,proc,sys,dev,root}
    # Debian's /bin/busybox is a dynamic program on some hosts: take the static one
    (cd "$work" && apt-get -qq download busybox-static/bookworm && dpkg-deb -x busybox-static*.deb bb)
    mv "$work/bb/bin/busybox" "$work/bin/busybox"; rm -rf "$work"/bb "$work"/*.deb
    local n=10
    for m in virtio_pci virtio_blk virtio_console crc32c_generic ext4 9pnet_virtio 9p overlay; do
        for ko in $(modprobe -d "$tree" -S "$release" --show-depends "$m" 2>/dev/null | awk '$1=="insmod"{print $2}'); do
            ls "$work"/lib/*-"$(basename "${ko%.ko*}")".ko >/dev/null 2>&1 && continue
            local to; to=$work/lib/$((n++))-$(basename "${ko%.ko*}").ko
            case $ko in *.xz) xz -dc "$ko" > "$to" ;; *.zst) zstd -dcq "$ko" > "$to" ;; *) cp "$ko" "$to" ;; esac
        done
    done
    cat > "$work/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc p /proc; $b mount -t sysfs s /sys; $b mount -t devtmpfs d /dev
for m in $($b ls /lib | $b sort -n); do $b insmod /lib/$m || $b echo "initramfs: cannot load $m"; done
$b mount -t ext4 -o rw,noatime /dev/vda /root || $b poweroff -f
$b mount -t tmpfs -o mode=755 run /root/run; $b mkdir -p /root/run/kernel; $b cp /guest-init.sh /root/run/
$b mount -t ext4 -o ro /dev/vdb /root/run/kernel
for d in dev proc sys; do $b mount --move /$d /root/$d; done
exec $b switch_root /root /run/guest-init.sh
INIT
    chmod +x "$work/init"
    (cd "$work" && find . | cpio --quiet -o -H newc | gzip -1) > "$out"
    rm -rf "$work"
}

# The guest's Debian tree as one ext4 file. Each run uses it through a throw-away snapshot.
build_rootfs() {
    local img=$CACHE/rootfs.ext4 tree=$CACHE/rootfs
    [ ! -e "$img" ] || return 0
    echo "run-in-kernel: building the guest tree (some minutes)" >&2
    rm -rf "$tree"; private_apt
    env -u APT_CONFIG mmdebstrap --quiet --variant=minbase --include=$(echo \
        python3 python3-bpfcc python3-pip kmod iproute2 iptables procps util-linux \
        strace gcc libc6-dev e2fsprogs ca-certificates | tr ' ' ,) \
        bookworm "$tree" - < <(grep -E ' bookworm(-security)? main' "$CACHE/apt/sources.list")
    # pip runs on the host and writes into the tree, with the host's index settings
    [ -z "$PIP" ] || python3 -m pip install -q --disable-pip-version-check --no-compile --python-version 3.11 --only-binary=:all: \
        --target "$tree/usr/local/lib/python3.11/dist-packages" $PIP
    mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -d "$tree" "$img.part" \
        $(( $(du -sm "$tree" | cut -f1) * 115 / 100 + 1024 ))M >/dev/null
    mv "$img.part" "$img"; rm -rf "$tree"
}

main() {   # a function, so that bash has read the whole file before it runs
    [ $# -ge 2 ] || { sed -n '2,26s/^# \{0,1\}//p' "$0"; exit 2; }
    local name=$1 rc=0; shift
    kernels "$name" >/dev/null
    mkdir -p "$CACHE"
    exec 9> "$CACHE/lock"; flock 9          # two first calls at once would build the same files
    fetch_kernel "$name"
    build_rootfs
    flock -u 9
    unset APT_CONFIG

    SRC=${SRC:-$(git rev-parse --show-toplevel 2>/dev/null || pwd)}
    OUT=${OUT:-$(mktemp -d "$CACHE/out.XXXXXX")}
    mkdir -p "$OUT"; rm -f "$OUT/.status"
    if [ $# -eq 1 ]; then printf '%s\n' "$1"; else printf '%q ' "$@"; echo; fi > "$OUT/.command"
    # the kernel unpacks concatenated archives one over the other
    { cat "$CACHE/$name/initramfs.gz"; (cd "$here" && echo guest-init.sh | cpio --quiet -o -H newc | gzip -1); } > "$OUT/.initrd"

    # Nehalem = x86-64-v2, without AVX: about 10 % less work for the emulator than -cpu max
    timeout --foreground "$TIMEOUT" ${QEMU:-qemu-system-x86_64} \
        -accel "$QEMU_ACCEL" -cpu "${CPU:-Nehalem}" -M q35,hpet=off -smp "$CPUS" -m "$MEMORY" \
        -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$CACHE/$name/vmlinux" -initrd "$OUT/.initrd" \
        -append "console=ttyS0 panic=-1 quiet mitigations=off random.trust_cpu=on cgroup_no_v1=all audit=0 $APPEND" \
        -drive "file=$CACHE/rootfs.ext4,if=virtio,format=raw,snapshot=on,cache=unsafe" \
        -drive "file=$CACHE/$name/kernel.ext4,if=virtio,format=raw,readonly=on" \
        -virtfs "local,path=$SRC,mount_tag=src,security_model=none,readonly=on,multidevs=remap" \
        -virtfs "local,path=$OUT,mount_tag=out,security_model=none,multidevs=remap" \
        -device virtio-rng-pci \
        -serial "file:$OUT/.console" \
        -device virtio-serial-pci -chardev stdio,id=con,signal=on -device virtconsole,chardev=con \
        || rc=$?
    rm -f "$OUT/.initrd"
    if [ -s "$OUT/.status" ]; then exit "$(cat "$OUT/.status")"; fi
    [ $rc -eq 124 ] && { echo "run-in-kernel: stopped after $TIMEOUT s" >&2; exit 124; }
    echo "run-in-kernel: the guest ended without a status (qemu $rc); its console ends with:" >&2
    tail -n 20 "$OUT/.console" >&2 || true
    exit 125
}

main "$@"
