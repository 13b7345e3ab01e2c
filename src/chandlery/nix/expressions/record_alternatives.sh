# Says which links a package's postinst would register with update-alternatives(1), without running it: the
# script (standard input) is read by a restricted bash that finds no program, may write no file, and sees no
# file but the package's own, which stand at / for it. One line per link group, tab separated, for
# root_filesystem:
#   link name path priority [slave-link slave-name slave-path]...
# usage: record_alternatives.sh PACKAGE-ROOT < postinst
set -euo pipefail
package=$1

prelude=$(cat <<'PRELUDE'
set() { :; }
command_not_found_handle() { :; }
update-alternatives() {
    local record= option
    while [ $# -gt 0 ]; do
        option=$1
        shift
        case $option in
            --install) record=$1$'\t'$2$'\t'$3$'\t'$4; shift 4 ;;
            --slave) record+=$'\t'$1$'\t'$2$'\t'$3; shift 3 ;;
        esac
    done
    if [ -n "$record" ]; then printf 'alternative\t%s\n' "$record"; fi
}
printf 'begun\n'
PRELUDE
)

# Output may not be redirected in a restricted shell, so what is thrown away or sent elsewhere isn't.
postinst=$(sed -E 's,&?[0-9]?>+ ?/dev/null,,g; s,[0-9]?>&[0-9-],,g; s,/usr/s?bin/update-alternatives,update-alternatives,g')
case $postinst in
    *update-alternatives*) ;;
    *) exit 0 ;;
esac
printf '%s\n' "$prelude" "$postinst" > postinst.restricted

# What bash consists of: it starts in a root where its libraries aren't in their places.
parts=$(ldd /bin/bash | sed -n 's,^[^/]*\(/[^ ]*\) (0x.*,\1,p')
loader=$(grep -m 1 '/ld-' <<< "$parts")
# A builder of Nix is no root, and gets its own user namespace for this.
[ "$(id -u)" = 0 ] && namespaces=(--mount) || namespaces=(--user --map-root-user --mount)

# Makes the root and becomes bash in it; every mount goes with the process. $1 is the package, $2 the loader of
# bash, $3 all that bash consists of.
in_root=$(cat <<'ROOT'
    package=$1 loader=$2
    mount -t tmpfs -o mode=755 none root
    mkdir root/.bash root/dev
    cp --dereference /bin/bash $3 postinst.restricted root/.bash
    : > root/dev/null
    mount --bind /dev/null root/dev/null
    # A user namespace may take no other flag from a mount, such as nosuid.
    flags=,$(findmnt --noheadings --output VFS-OPTIONS --target "$package")
    for path in "$package"/*; do
        place=root/${path##*/}
        if [ -L "$path" ]; then
            cp --no-dereference "$path" "$place"
        elif [ ! -e "$place" ] && [ -e "$path" ]; then
            if [ -d "$path" ]; then mkdir "$place"; else : > "$place"; fi
            mount --bind "$path" "$place"
            mount -o "remount,bind,ro${flags#,r[ow]}" "$place"
        fi
    done
    mount -o remount,bind,ro root
    # Seconds, and KiB of output and of memory: a script that never ends is stopped.
    ulimit -t 2
    ulimit -f 1024
    ulimit -v 1000000
    # No globs (-f): what a package has is known, and what other packages have isn't. What is on the PATH must be
    # nothing that a package can have. No program runs; if one did, it would have no rights.
    exec env -i PATH=/.bash/none LC_ALL=C DPKG_MAINTSCRIPT_NAME=postinst DPKG_ROOT= \
        /usr/bin/setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+sys_chroot \
        /usr/sbin/chroot root "/.bash/${loader##*/}" --library-path /.bash \
        /.bash/bash --noprofile --norc --restricted -f /.bash/postinst.restricted configure ''
ROOT
)
mkdir root
# Not in a pipe: what is left running would hold it open.
timeout --signal=KILL 20 unshare "${namespaces[@]}" /bin/bash -euc "$in_root" in_root "$package" "$loader" "$parts" \
    < /dev/null > recorded 2> trouble || true
rmdir root
if [ "$(head -n 1 recorded)" != begun ]; then
    printf 'a maintainer script is read in a user namespace: let builders make some (sysctl %s above 0): %s\n' \
        user.max_user_namespaces "$(head -n 1 trouble)" >&2
    exit 1
fi
rm trouble
sed -n 's/^alternative\t//p' recorded
