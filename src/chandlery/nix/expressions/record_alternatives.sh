# Says which links a package's postinst would register with update-alternatives(1), without running it:
# the script (standard input) is read by a restricted bash that finds no program, may write no file, and
# whose tests of files see only the package's own. One line per link group, tab separated, for root_filesystem:
#   link name path priority [slave-link slave-name slave-path]...
# usage: record_alternatives.sh PACKAGE-ROOT < postinst
set -euo pipefail
root=$1

prelude=$(cat <<'PRELUDE'
set() { :; }
command_not_found_handle() { :; }
update-alternatives() {
    local record= option
    while builtin [ $# -gt 0 ]; do
        option=$1
        shift
        case $option in
            --install) record=$1$'\t'$2$'\t'$3$'\t'$4; shift 4 ;;
            --slave) record+=$'\t'$1$'\t'$2$'\t'$3; shift 3 ;;
        esac
    done
    if builtin [ -n "$record" ]; then printf 'alternative\t%s\n' "$record"; fi
}
function [ {
    local words=("${@:1:$#-1}")
    test "${words[@]}"
}
test() {
    local words=() operator= word
    for word; do
        case $operator$word in
            -[defhLrswx]/*) words+=("$package_root$word") ;;
            *) words+=("$word") ;;
        esac
        operator=$word
    done
    builtin test "${words[@]}"
}
PRELUDE
)

# Output may not be redirected in a restricted shell, so what is thrown away or sent elsewhere isn't.
postinst=$(sed -E 's,&?[0-9]?>+ ?/dev/null,,g; s,[0-9]?>&[0-9-],,g; s,/usr/s?bin/update-alternatives,update-alternatives,g')

printf '%s\n' "$prelude" "package_root='$root'" "$postinst" > postinst.restricted
(
    # Seconds, and KiB of output and of memory: a script that never ends is stopped.
    ulimit -t 2 -f 1024 -v 1000000
    # No globs (-f): they would find this machine's files. Not in a pipe: what is left running would hold it open.
    exec env -i PATH=/nonexistent LC_ALL=C DPKG_MAINTSCRIPT_NAME=postinst DPKG_ROOT= \
        /usr/bin/timeout --signal=KILL 20 \
        /bin/bash --noprofile --norc --restricted -f postinst.restricted configure ''
) < /dev/null > recorded 2> /dev/null || true
sed -n 's/^alternative\t//p' recorded
