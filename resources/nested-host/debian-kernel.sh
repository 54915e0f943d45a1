# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Debian's kernel packages without installing them; for scripts that have sourced scripts/lib.sh.

update_lists() {
    [ "$(id -u)" = 0 ] || die "cannot read Debian's package lists: run  sudo apt-get update"
    apt-get -qq -o DPkg::Lock::Timeout=600 update >&2 || die "cannot read Debian's package lists"
}

kernel_package() {
    apt-cache depends "$1" 2>/dev/null | awk '/Depends: linux-image-/ {print $2; exit}'
}

# The files only of the kernel that meta package $1 names, into $2: installing it would put a kernel into the host's /boot.
fetch_kernel() {
    local meta=$1 into=$2 package sandbox=()
    [ "$(id -u)" = 0 ] && sandbox=(-o APT::Sandbox::User=root)
    package=$(kernel_package "$meta") || true
    if [ -z "$package" ]; then
        update_lists
        package=$(kernel_package "$meta") || die "Debian's package lists have no $meta"
    fi
    say "fetching $package"
    if ! (cd "$into" && apt-get -qq "${sandbox[@]}" download "$package" >&2); then
        # the version that the lists name may have been superseded
        update_lists
        package=$(kernel_package "$meta")
        (cd "$into" && apt-get -qq "${sandbox[@]}" download "$package" >&2) || die "cannot download $package"
    fi
    dpkg-deb -x "$into/$package"_*.deb "$into" || die "cannot unpack $package"
    rm -rf "$into/$package"_*.deb "$into/usr"
    /sbin/depmod -b "$into" "$(ls "$into/lib/modules")" || die "depmod failed on $into"
}

# Prints every module that the given ones need, in loading order.
module_closure() {
    local modules=$1
    shift
    awk -v wanted="$*" '
        function base(path) { sub(/.*\//, "", path); sub(/\.ko.*/, "", path); gsub(/-/, "_", path); return path }
        { file = $1; sub(/:$/, "", file); path[base(file)] = file; deps[base(file)] = $0 }
        function load(name,    d, n, i) {
            if (name in done) return
            done[name] = 1
            if (!(name in path)) return        # built in
            n = split(deps[name], d, " ")
            for (i = n; i > 1; i--) load(base(d[i]))
            print path[name]
        }
        END {
            n = split(wanted, w, " ")
            for (i = 1; i <= n; i++) load(w[i])
        }' "$modules/modules.dep"
}

# put_modules MODULES INTO NAME…: copies what the names need, uncompressed, and lists it in INTO/order.
put_modules() {
    local modules=$1 into=$2 file base
    shift 2
    mkdir -p "$into"
    for file in $(module_closure "$modules" "$@"); do
        base=$(basename "$file")
        case $base in
            *.xz) base=${base%.xz}; xz -dc "$modules/$file" >"$into/$base" ;;
            *.zst) base=${base%.zst}; zstd -qdc "$modules/$file" >"$into/$base" ;;
            *) cp "$modules/$file" "$into/$base" ;;
        esac || die "cannot copy $file"
        echo "$base" >>"$into/order"
    done
}
