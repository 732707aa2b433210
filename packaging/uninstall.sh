#!/bin/sh
# Removes kms-agent as install.sh put it there. May be run again. POSIX sh, coreutils and util-linux.
set -eu
# Whoever calls this: no output of 'cd', tools of root's that a short PATH leaves out.
unset CDPATH
export LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin"

home=/usr/local/alibabacloudkmsagent
unit_dir=/etc/systemd/system
user=kmsagent
token_group=kmstoken

usage() {
    cat <<END
Usage: uninstall.sh [--purge] [--root DIR]

Stops and removes kms-agent and its token. Keeps config.toml, ca.pem and logs/ in
$home, and the accounts, for a next installation.

  --purge       remove those, too; only a LogPath elsewhere stays
  --root DIR    remove the files that install.sh staged below this folder, and do nothing else

Or as variables: KMS_AGENT_PURGE=1, KMS_AGENT_ROOT.
END
}

say() { printf '%s\n' "kms-agent: $*"; }

fail() {
    say "$@" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

case ${KMS_AGENT_PURGE:-} in
    '' | 0 | no | false) purge='' ;;
    1 | yes | true) purge=1 ;;
    *) usage >&2; exit 2 ;;
esac
root=${KMS_AGENT_ROOT:-}
while [ $# -gt 0 ]; do
    case $1 in
        --purge) purge=1 ;;
        # Empty is not "none": '--root "$unset"' must not remove what is installed on this host.
        --root=?*) root=${1#*=} ;;
        --root)
            [ -n "${2:-}" ] || { usage >&2; exit 2; }
            root=$2
            shift
            ;;
        --help | -h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$root" ]; then
    root=$(cd "$root" && pwd) || exit 1
else
    [ "$(id -u)" = 0 ] || fail "only root can remove it"
    for owner in "dpkg-query --search" "rpm --query --file"; do
        # shellcheck disable=SC2086 # a command and its options
        if have "${owner%% *}" && $owner "$home/bin/kms-agent" >/dev/null 2>&1; then
            fail "it was installed as a package (${owner%% *} knows it): remove that"
        fi
    done
    if have flock && [ -d "$unit_dir" ]; then
        exec 9<"$unit_dir"
        flock --nonblock 9 || fail 'an installation is running'
    fi
fi

unit=$root$unit_dir/kms-agent.service
if [ -z "$root" ] && have systemctl && [ -f "$unit" ]; then
    [ ! -d /run/systemd/system ] || systemctl stop kms-agent
    systemctl disable kms-agent >/dev/null 2>&1 || true
fi
[ -z "$purge" ] || [ ! -f "$unit.d/log-path.conf" ] || while IFS= read -r line; do
    case $line in ReadWriteDirectories=*) say "kept: the logs in ${line#*=}" ;; esac
done <"$unit.d/log-path.conf"
rm -f "$unit" "$unit.d/log-path.conf" "$unit.d/no-user-namespaces.conf"
# Somebody else's drop-ins keep their folder, unless nothing is to stay.
[ -z "$purge" ] || rm -rf "$unit.d"
[ ! -d "$unit.d" ] || rmdir "$unit.d" 2>/dev/null || say "kept: $unit.d"
if [ -z "$root" ] && [ -d /run/systemd/system ] && have systemctl; then
    systemctl daemon-reload
    systemctl reset-failed kms-agent 2>/dev/null || true
fi

[ -n "$root" ] || rm -f /var/run/kmstoken
link=$root/usr/local/bin/kms-agent
[ "$(readlink "$link" 2>/dev/null)" != "$home/bin/kms-agent" ] || rm -f "$link"
rm -f "$root/usr/local/share/man/man8/kms-agent.8"
cd /
if [ -n "$purge" ]; then
    # By name first: the folder may be a link to where there is more space.
    for name in bin logs config.toml config.toml.sample ca.pem uninstall.sh; do
        rm -rf "$root${home:?}/$name"
    done
    rm -rf "$root${home:?}"
else
    rm -rf "$root${home:?}/bin"
    rm -f "$root$home/config.toml.sample" "$root$home/uninstall.sh"
    # Empty: nothing of it is worth keeping.
    rmdir "$root$home/logs" "$root$home" 2>/dev/null || true
    [ ! -d "$root$home" ] || say "kept: $root$home (--purge removes it)"
fi
if [ -n "$purge" ] && [ -z "$root" ]; then
    ! getent passwd "$user" >/dev/null || userdel "$user"
    for group in "$user" "$token_group"; do
        # It may be somebody's primary group.
        ! getent group "$group" >/dev/null || groupdel "$group" || say "kept: the group $group"
    done
fi
say "removed"
