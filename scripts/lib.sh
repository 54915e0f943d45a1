# SPDX-License-Identifier: Apache-2.0
# What the scripts share; sourced, with `name` set to the script's own name.
# shellcheck shell=bash

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
guest=$project/target/guest

say() { echo "$name: $*" >&2; }
die() {
    say "$*"
    exit 1
}

# logged LABEL LOG CMD…: runs CMD quietly, its output to LOG; on a terminal the time passes beside the label.
logged() {
    local label=$1 log=$2 start=$SECONDS status=0 child
    shift 2
    mkdir -p "$(dirname "$log")"
    say "$label"
    # Descriptor 9 may hold a lock, which must not outlive this script.
    "$@" >"$log" 2>&1 </dev/null 9>&- &
    child=$!
    # A background job of a script is deaf to Ctrl-C.
    trap 'kill "$child" 2>/dev/null; exit 130' INT TERM
    if [ -t 2 ]; then
        while kill -0 "$child" 2>/dev/null; do
            printf '\r%s: %s (%d s) ' "$name" "$label" $((SECONDS - start)) >&2
            sleep 1
        done
        printf '\r\033[K' >&2
    fi
    wait "$child" || status=$?
    trap - INT TERM
    if [ "$status" != 0 ]; then
        tail -n 30 "$log" >&2
        die "$label: failed after $((SECONDS - start)) s; the whole log is $log"
    fi
    say "$label: done in $((SECONDS - start)) s"
}

# need_packages PACKAGE…: installs those Debian packages that are missing.
need_packages() {
    local package missing=
    for package; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=" $package"
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || die "packages are missing and there is no apt-get:$missing"
    [ "$(id -u)" = 0 ] || die "packages are missing: run  sudo apt-get install$missing"
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends)
    # shellcheck disable=SC2086
    if ! "${install[@]}" --dry-run $missing >/dev/null 2>&1; then
        logged "updating the package lists" "$guest/log/apt-update" apt-get -o DPkg::Lock::Timeout=600 update -q
    fi
    # shellcheck disable=SC2086
    logged "installing packages:$missing" "$guest/log/apt-install" "${install[@]}" $missing
}

# kvm_kind: pvm, hardware or none, as far as names tell; `rvmm doctor` probes.
kvm_kind() {
    if [ -d /sys/module/kvm_pvm ]; then
        echo pvm
    elif grep -qEw 'vmx|svm' /proc/cpuinfo; then
        echo hardware
    else
        echo none
    fi
}

# host_kernel: which of the two guest kernels this host needs.
host_kernel() {
    if [ "$(kvm_kind)" = pvm ]; then echo pvm; else echo full; fi
}

# kernel_file KIND: where build-kernel puts it.
kernel_file() {
    case $1 in
    pvm) echo "$guest/vmlinux-pvm" ;;
    full) echo "$guest/vmlinux" ;;
    esac
}

# place FROM TO: a copy that replaces TO in one step, so that nobody sees half a file or a changing one.
place() {
    cmp -s "$1" "$2" && return 0
    cp --sparse=always "$1" "$2.$$" && mv -f "$2.$$" "$2"
}

# link_seccomp_statically: has cargo put libseccomp into the programs; a static program with a shared library does not run.
link_seccomp_statically() {
    LIBSECCOMP_LIB_PATH=$(dirname "$(gcc -print-file-name=libseccomp.a)")
    export LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH
}

# build_rvmm [PREFIX…]: target/release/rvmm and rvmm-engine, linked statically: they start sooner, take less memory
# (docs/performance.md), and run on hosts with other libraries. `cargo build --release` makes the same, linked dynamically.
build_rvmm() {
    local binary
    for binary in rvmm rvmm-engine; do
        (cd "$project" && link_seccomp_statically && "$@" cargo rustc --release --locked --bin $binary -- -C target-feature=+crt-static) || return
    done
}
