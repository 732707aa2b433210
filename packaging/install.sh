#!/bin/sh
# Installs kms-agent on this host, or upgrades it. It asks nothing, needs no network, and may be run again at any time.
# It needs a POSIX sh, coreutils and util-linux (and systemd). 'install.sh --help' has the options.
set -eu
# Whatever the caller has set: others can enter the folders, 'cd' prints nothing, and root's tools are in PATH.
umask 022
unset CDPATH
export LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin"

home=/usr/local/alibabacloudkmsagent
unit_dir=/etc/systemd/system
user=kmsagent
token_group=kmstoken
# Longer than the agent takes to start on any host, and short enough to wait for.
ping_seconds=15

# What can be configured from here: flag, section and key of config.toml, kind, meaning. The variable of a flag is
# KMS_AGENT_ and the flag in capitals, with _ in place of -.
settings='
http-port Server HttpPort number port on 127.0.0.1 and [::1] (2025)
max-conn Server MaxConn number connections at a time (800)
ssrf-headers Server SSRFHeaders list headers that may carry the token
ssrf-env Server SSRFEnvVariables list environment variables for the token
memory-limit Cache CacheSize number cached secrets (1000)
ttl Cache TTLSeconds number seconds that a value is fresh (300)
region KMS Region text region id (asked of the metadata service)
endpoint KMS Endpoint text KMS, host or host:port (kms-vpc.<region>.aliyuncs.com)
aap-arn KMS AapArn text application access point, for instance identity
ca-file KMS CaFile file PEM file to trust, copied to config.toml'"'"'s folder
log-level Log LogLevel text debug, info, warn or error (debug)
log-path Log LogPath text folder, or - for the journal (./logs/)
log-size Log LogFileSizeMB number MiB of a log file (100)
log-backups Log LogBackupFiles number rotated files that are kept (2)
'

usage() {
    cat <<END
Usage: install.sh [OPTION]..

Installs kms-agent to $home, or upgrades it. An upgrade
keeps the configuration and changes only the keys that are given here. If the new version
does not answer, the old one is put back.

Each option may be given as a variable instead: --http-port as KMS_AGENT_HTTP_PORT, and
--no-check as KMS_AGENT_NO_CHECK=1. An empty variable counts as not set.

END
    echo "$settings" | while read -r flag section key kind meaning; do
        case $kind in number) value=N ;; list) value=A,B ;; file) value=FILE ;; *) value=TEXT ;; esac
        [ -z "$flag" ] || printf '  --%-19s %s\n' "$flag $value" "$meaning"
    done
    cat <<END
  --app-user A,B        users that may read the token; they are added to the group $token_group
  --config FILE         a whole config.toml to install instead of the sample
  --binary FILE         the binary (kms-agent beside this script)
  --no-check            do not run 'kms-agent check' at the end
  --no-start            install the agent and do not start it
  --root DIR            only put the files below this folder

Exit codes: 0 installed, 1 failed (an upgrade was rolled back), 2 wrong usage,
3 the agent is installed and running, but 'kms-agent check' found a problem.
END
}

say() { printf '%s\n' "kms-agent: $*"; }

fail() {
    say "$@" >&2
    exit 1
}

misused() {
    say "$@" "(see 'install.sh --help')" >&2
    exit 2
}

have() { command -v "$1" >/dev/null 2>&1; }

# 'some-flag' as the name of a variable: 'some_flag', and in capitals.
lower() { printf %s "$1" | tr - _; }
upper() { printf %s "$1" | tr a-z- A-Z_; }

# A switch's variable as a switch: 1 or nothing.
switch() {
    case $2 in
        '' | 0 | no | false) ;;
        1 | yes | true) echo 1 ;;
        *) misused "$1=$2: it must be 1 or 0" ;;
    esac
}

# ---- Arguments ----

app_user=${KMS_AGENT_APP_USER:-}
config_from=${KMS_AGENT_CONFIG:-}
binary_from=${KMS_AGENT_BINARY:-}
no_check=$(switch KMS_AGENT_NO_CHECK "${KMS_AGENT_NO_CHECK:-}")
no_start=$(switch KMS_AGENT_NO_START "${KMS_AGENT_NO_START:-}")
root=${KMS_AGENT_ROOT:-}
flags=$(echo "$settings" | cut -d ' ' -f 1)
flags=" $(printf %s "$flags" | tr '\n' ' ') "
for flag in $flags; do
    eval "given_$(lower "$flag")=\${KMS_AGENT_$(upper "$flag"):-}"
done

must_be_option() {
    case " app-user config binary root$flags" in
        *" $1 "*) ;;
        *) misused "unknown option --$1" ;;
    esac
}

while [ $# -gt 0 ]; do
    flag=${1#--}
    case $1 in
        --help | -h) usage; exit 0 ;;
        --no-check) no_check=1; shift; continue ;;
        --no-start) no_start=1; shift; continue ;;
        --*=*) value=${flag#*=} flag=${flag%%=*}; must_be_option "$flag"; shift ;;
        --*)
            must_be_option "$flag"
            [ $# -gt 1 ] || misused "--$flag needs a value"
            value=$2
            shift 2
            ;;
        *) misused "unexpected argument $1" ;;
    esac
    # An empty value does not count as none: '--root "$unset"' must not install on this host.
    [ -n "$value" ] || misused "--$flag needs a value"
    case $flag in
        app-user) app_user=$value ;;
        config) config_from=$value ;;
        binary) binary_from=$value ;;
        root) root=$value ;;
        *) eval "given_$(lower "$flag")=\$value" ;;
    esac
done

here=$(cd "$(dirname "$0")" && pwd)
binary_from=${binary_from:-$here/kms-agent}
[ -f "$binary_from" ] || misused "$binary_from does not exist; --binary names another binary"
binary_from=$(cd "$(dirname "$binary_from")" && pwd)/$(basename "$binary_from")
[ -z "$config_from" ] || [ -f "$config_from" ] || misused "--config $config_from: the file does not exist"

if [ -n "$root" ]; then
    [ -z "$app_user" ] || misused "--app-user cannot be used with --root, which changes no accounts"
    mkdir -p "$root"
    root=$(cd "$root" && pwd)
    no_start=1
fi
home_real=$root$home

# A value as TOML. Escapes are refused rather than written: nothing that is set here needs one.
toml() {
    kind=$1 flag=$2 value=$3
    case $value in
        *[\"\\]* | *"
"*) misused "--$flag: the value must have no quotes, backslashes or line ends" ;;
    esac
    case $kind in
        number)
            case $value in *[!0-9]*) misused "--$flag $value: the value must be a number" ;; esac
            printf %s "$value"
            ;;
        list)
            list=
            old_ifs=$IFS
            IFS=', '
            set -f
            for item in $value; do list="$list${list:+, }\"$item\""; done
            set +f
            IFS=$old_ifs
            printf '[%s]' "$list"
            ;;
        *) printf '"%s"' "$value" ;;
    esac
}

# ---- Reading and changing config.toml: a key a line, as in the sample ----

# The value of an active KEY in FILE as written, quotes taken off; nothing if there is none.
read_key() {
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line#"${line%%[![:blank:]]*}"}
        case $line in
            "$1"[[:blank:]=]*)
                line=${line#*=}
                line=${line#"${line%%[![:blank:]]*}"}
                case $line in
                    \"*) line=${line#\"} line=${line%%\"*} ;;
                    \'*) line=${line#\'} line=${line%%\'*} ;;
                    *) line=${line%%[[:space:]#]*} ;;
                esac
                printf %s "$line"
                return
                ;;
        esac
    done <"$2"
}

# Sets KEY in [SECTION] of FILE: in place of the active line, else of the first comment that shows it, else below
# the section's name, else at the end.
set_key() {
    section=$1 key=$2 value=$3 file=$4
    number=0 in_section='' active='' comment='' header=''
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line#"${line%%[![:blank:]]*}"}
        case $line in
            "[$section]"* | "[ $section ]"*) in_section=1 header=$number ;;
            "["[A-Za-z\ ]*) in_section='' ;;
        esac
        [ -n "$in_section" ] || continue
        case $line in
            "$key"[[:blank:]=]*)
                active=$number
                line=${line#*=}
                case ${line#"${line%%[![:blank:]]*}"} in
                    *"]"*) ;;
                    "["* | *\"\"\"*) fail "config.toml: the value of $key spans several lines; change it by hand" ;;
                esac
                ;;
            "#$key"[[:blank:]=]*) comment=${comment:-$number} ;;
        esac
    done <"$file"
    replace=${active:-$comment}
    number=0
    {
        while IFS= read -r line || [ -n "$line" ]; do
            number=$((number + 1))
            if [ "$number" = "$replace" ]; then
                printf '%s\n' "$key = $value"
            else
                printf '%s\n' "$line"
                [ -n "$replace" ] || [ "$number" != "$header" ] || printf '%s\n' "$key = $value"
            fi
        done <"$file"
        [ -n "$replace$header" ] || printf '\n[%s]\n%s\n' "$section" "$key = $value"
    } >"$file.edit"
    mv -f "$file.edit" "$file"
}

# ---- Checks before anything is touched ----

[ "$(uname -s)" = Linux ] || fail "this is $(uname -s), and the agent runs on Linux only"
version=$("$binary_from" --version 2>/dev/null) ||
    fail "$binary_from does not run here ($(uname -m)): check its architecture, its mode (+x), and that the file system is not mounted noexec"
version=${version#kms-agent }
unit_from=$here/systemd/kms-agent.service
for file in "$unit_from" "$here/config.toml" "$here/uninstall.sh"; do
    [ -f "$file" ] || fail "$file is missing; unpack the whole bundle"
done

if [ -z "$root" ]; then
    [ "$(id -u)" = 0 ] || fail "only root can install the agent (--root DIR puts the files below a folder without being root)"
    for owner in "dpkg-query --search" "rpm --query --file"; do
        # shellcheck disable=SC2086 # a command and its options
        if have "${owner%% *}" && $owner "$home/bin/kms-agent" >/dev/null 2>&1; then
            fail "the agent was installed as a package (${owner%% *} knows it); upgrade that package"
        fi
    done
    # Two installations at a time would spoil each other's rollback. The lock is on a folder, which leaves no file behind.
    if have flock && [ -d "$unit_dir" ]; then
        exec 9<"$unit_dir"
        flock --nonblock 9 || fail 'another installation is running'
    fi
fi
set -f
for name in $(printf %s "$app_user" | tr , ' '); do
    getent passwd "$name" >/dev/null || misused "--app-user $name: there is no such user"
done
set +f
if [ -z "$no_start" ]; then
    { [ -d /run/systemd/system ] && have systemctl; } ||
        fail "systemd is not running here; --no-start installs without starting"
fi

# KiB on the file system of FOLDER, or of the nearest folder above it that exists.
free_kib() {
    folder=$1
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    # shellcheck disable=SC2046 # the columns are wanted
    set -- $(df -Pk "$folder" 2>/dev/null | tail -n 1)
    echo "${4:-}"
}
binary_kib=$(($(wc -c <"$binary_from") / 1024 + 1))
# The old binary, the new one, and room for small files.
needed_kib=$((2 * binary_kib + 1024))
free=$(free_kib "$home_real")
[ "$free" -ge "$needed_kib" ] || fail "$home_real: $free KiB are free, and $needed_kib KiB are needed"

# Whether something on this host listens on PORT of loopback (or of all addresses).
port_taken() {
    hex=$(printf %04X "$1")
    for table in /proc/net/tcp /proc/net/tcp6; do
        [ -r "$table" ] || continue
        while read -r _ address _ state _; do
            # 0A: listening. 127.0.0.1, 0.0.0.0, [::1], [::] and [::ffff:127.0.0.1] (Java), as the kernel prints them on
            # little-endian machines.
            case $state$address in
                "0A0100007F:$hex" | "0A00000000:$hex") return 0 ;;
                "0A00000000000000000000000001000000:$hex" | "0A00000000000000000000000000000000:$hex") return 0 ;;
                "0A0000000000000000FFFF00000100007F:$hex") return 0 ;;
            esac
        done <"$table"
    done
    return 1
}

# ---- What will be configured, in a folder that goes with this script ----

stage=$(mktemp -d)
# undo: files have been changed, and are put back if this script ends now. begun: when the daemon was restarted with them.
undo='' begun=''
# shellcheck disable=SC2317,SC2329 # called by the trap
leave() {
    code=$?
    trap - EXIT HUP INT TERM
    set +e
    if [ -n "$undo" ]; then
        put_back
        [ -z "$begun" ] || { systemctl daemon-reload; systemctl restart kms-agent; }
        say 'the installation was not finished; what it had changed was put back' >&2
    fi
    [ ! -f "$stage/touched" ] || while IFS= read -r file; do rm -f "$file.new" "$file.old"; done <"$stage/touched"
    rm -rf "$stage"
    exit "$code"
}
trap leave EXIT
# dash does not run the EXIT trap when a signal ends it.
trap 'exit 1' HUP INT TERM
config=$home_real/config.toml
# A link's target is what is changed. In a staged root a link may lead out of it; there a file takes its place.
[ -n "$root" ] || [ ! -L "$config" ] || config=$(readlink -f "$config")
if [ -n "$config_from" ]; then
    cat "$config_from" >"$stage/config.toml"
elif [ -f "$config" ]; then
    cat "$config" >"$stage/config.toml"
else
    cat "$here/config.toml" >"$stage/config.toml"
fi
if [ -n "${given_ca_file:=}" ]; then
    [ -r "$given_ca_file" ] || misused "--ca-file $given_ca_file: the file cannot be read"
    cat "$given_ca_file" >"$stage/ca.pem"
    given_ca_file=$home/ca.pem
fi
echo "$settings" >"$stage/settings"
while read -r flag section key kind _; do
    [ -n "$flag" ] || continue
    eval "value=\$given_$(lower "$flag")"
    [ -n "$value" ] || continue
    value=$(toml "$kind" "$flag" "$value") || exit 2
    set_key "$section" "$key" "$value" "$stage/config.toml"
done <"$stage/settings"
# The agent itself is the judge of its configuration: 2 is its exit code for a wrong one.
code=0
problems=$("$binary_from" status --config "$stage/config.toml" 2>&1) || code=$?
if [ "$code" = 2 ]; then
    # The staged file will be gone, so the message names the option or the installed configuration instead.
    problems=${problems#*:*:}
    named=''
    while read -r flag section key _; do
        [ -n "$flag" ] || continue
        eval "value=\$given_$(lower "$flag")"
        case ${value:+$problems} in *"[$section] $key"*) named="$named --$flag" ;; esac
    done <"$stage/settings"
    [ -z "$named" ] || misused "wrong value:$named; nothing was changed:$problems"
    fail "the configuration is wrong, nothing was changed:$problems"
fi

# TOML's 2_025 and 0x7E9 are 2025 to the tools below.
read_number() {
    number=$(read_key "$1" "$2" | tr -d _)
    echo $((${number:-$3}))
}
port=$(read_number HttpPort "$stage/config.toml" 2025)
log_path=$(read_key LogPath "$stage/config.toml")
case ${log_path:=./logs/} in
    -) log_dir='' ;;
    /*) log_dir=$log_path ;;
    *) log_dir=$home/${log_path#./} ;;
esac
log_dir=${log_dir%/}
case $log_dir in
    *[\"\'\\%]*) fail "LogPath $log_dir: it must have no quotes, backslashes or %, which systemd would read differently" ;;
esac

# The version that is there.
old_version=''
[ ! -x "$home_real/bin/kms-agent" ] ||
    old_version=$("$home_real/bin/kms-agent" --version 2>/dev/null) || old_version='kms-agent of unknown version'
old_version=${old_version#kms-agent }
running=''
[ -n "$no_start" ] || ! systemctl --quiet is-active kms-agent || running=1
if [ -z "$no_start" ] && [ "$port" != 0 ]; then
    old_port=2025
    [ ! -f "$config" ] || old_port=$(read_number HttpPort "$config" 2025)
    # A running agent holds its own port.
    if [ -z "$running" ] || [ "$old_port" != "$port" ]; then
        ! port_taken "$port" || fail "another program listens on port $port (ss -ltnp 'sport = :$port' shows it); --http-port sets another port"
    fi
fi
if [ -n "$log_dir" ] && [ -z "$old_version" ]; then
    size=$(read_number LogFileSizeMB "$stage/config.toml" 100)
    files=$(read_number LogBackupFiles "$stage/config.toml" 2)
    log_kib=$((size * (files + 1) * 1024))
    free=$(free_kib "$root$log_dir")
    [ "$free" -ge "$log_kib" ] || say "warning: $((free / 1024)) MiB are free for logs of up to $((log_kib / 1024)) MiB"
fi

# ---- Accounts ----

if [ -z "$root" ]; then
    for group in "$user" "$token_group"; do
        if ! getent group "$group" >/dev/null; then
            groupadd --system "$group"
            say "created the group $group"
        fi
    done
    if ! getent passwd "$user" >/dev/null; then
        useradd --system --gid "$user" --groups "$token_group" --home-dir "$home" --no-create-home \
            --shell /sbin/nologin --comment 'KMS agent' "$user"
        say "created the user $user"
    fi
    for name in $(printf %s "$app_user" | tr , ' '); do
        usermod --append --groups "$token_group" "$name"
        say "$name may read the token from its next login on, as a member of $token_group"
    done
fi

# ---- Files: each written beside its place, then moved there in one step ----

same() { [ -f "$1" ] && [ -f "$2" ] && [ "$(sha256sum <"$1")" = "$(sha256sum <"$2")" ]; }

changed=''
# Before FILE is changed, its old content gets a second name beside it until the end, which needs no space.
remember() {
    mkdir -p "$(dirname "$1")"
    printf '%s\n' "$1" >>"$stage/touched"
    rm -f "$1.old"
    [ ! -f "$1" ] || ln "$1" "$1.old" 2>/dev/null || cp -p "$1" "$1.old"
    changed=1
}
# put MODE FROM TO
put() {
    if same "$2" "$3"; then
        chmod "$1" "$3"
        return
    fi
    remember "$3"
    install -m "$1" "$2" "$3.new"
    # A configuration that only its owner may read keeps its owner, which may be the agent.
    [ "$3" != "$config" ] || [ ! -f "$3" ] || chown --reference="$3" "$3.new"
    mv -f "$3.new" "$3"
}
drop() {
    [ -f "$1" ] || return 0
    remember "$1"
    rm -f "$1"
}
put_back() {
    undo=''
    [ -f "$stage/touched" ] || return 0
    while IFS= read -r file; do
        rm -f "$file.new"
        if [ -f "$file.old" ]; then mv -f "$file.old" "$file"; else rm -f "$file"; fi
    done <"$stage/touched"
}

undo=1
mkdir -p "$home_real/bin" "$home_real/logs"
chmod 755 "$home_real" "$home_real/bin"
chmod 750 "$home_real/logs"
[ -n "$root" ] || chown "$user:$user" "$home_real/logs"
if [ -n "$log_dir" ] && [ "$log_dir" != "$home/logs" ] && [ ! -d "$root$log_dir" ]; then
    mkdir -p "$root$log_dir"
    chmod 750 "$root$log_dir"
    [ -n "$root" ] || chown "$user:$user" "$log_dir"
fi
# The unit lets the agent write to its own logs only.
log_unit=$root$unit_dir/kms-agent.service.d/log-path.conf
if [ -n "$log_dir" ] && [ "$log_dir" != "$home/logs" ]; then
    printf '# Made by install.sh: LogPath of %s\n[Service]\nReadWriteDirectories="%s"\n' \
        "$home/config.toml" "$log_dir" >"$stage/log-path.conf"
    put 644 "$stage/log-path.conf" "$log_unit"
else
    drop "$log_unit"
fi
# Where user namespaces are switched off, systemd starts nothing that wants one.
user_unit=$root$unit_dir/kms-agent.service.d/no-user-namespaces.conf
if [ -z "$root" ] && [ "$(cat /proc/sys/user/max_user_namespaces 2>/dev/null)" = 0 ]; then
    printf '# Made by install.sh: user.max_user_namespaces is 0\n[Service]\nPrivateUsers=no\n' \
        >"$stage/no-user-namespaces.conf"
    put 644 "$stage/no-user-namespaces.conf" "$user_unit"
else
    drop "$user_unit"
fi
mode=644
[ ! -f "$config" ] || mode=$(stat -L -c %a "$config")
put "$mode" "$stage/config.toml" "$config"
[ ! -f "$stage/ca.pem" ] || put 644 "$stage/ca.pem" "$home_real/ca.pem"
put 644 "$unit_from" "$root$unit_dir/kms-agent.service"
put 755 "$binary_from" "$home_real/bin/kms-agent"
restart=$changed

# The daemon uses none of these, so they need no restart.
put 644 "$here/config.toml" "$home_real/config.toml.sample"
put 755 "$here/uninstall.sh" "$home_real/uninstall.sh"
[ ! -f "$here/kms-agent.8" ] || put 644 "$here/kms-agent.8" "$root/usr/local/share/man/man8/kms-agent.8"
mkdir -p "$root/usr/local/bin"
ln -sfn "$home/bin/kms-agent" "$root/usr/local/bin/kms-agent"
if [ -z "$root" ] && have restorecon; then restorecon -R "$home" "$unit_dir/kms-agent.service" || true; fi

if [ -n "$no_start$root" ] || [ -z "$old_version" ]; then undo=''; fi
if [ -n "$root" ]; then
    say "put $version below $root; accounts have to be created and the unit has to be enabled by other means"
    exit 0
fi
if [ -n "$no_start" ]; then
    ! have systemctl || systemctl enable kms-agent >/dev/null 2>&1 || say "warning: could not enable the unit"
    say "$version is installed and was not started"
    exit 0
fi

# ---- Start, and back again if it does not answer ----

ping_agent() {
    systemctl --quiet is-active kms-agent || return 1
    if [ "$port" = 0 ]; then
        return 0
    elif have curl; then
        [ "$(curl --silent --noproxy '*' --max-time 2 "http://127.0.0.1:$port/ping")" = healthy ]
    elif have wget; then
        [ "$(wget --quiet --output-document=- --no-proxy --timeout=2 --tries=1 "http://127.0.0.1:$port/ping")" = healthy ]
    else
        "$home/bin/kms-agent" status >/dev/null 2>&1
    fi
}

wait_for_ping() {
    end=$(($(date +%s) + ping_seconds))
    until ping_agent; do
        [ "$(date +%s)" -lt "$end" ] && ! systemctl --quiet is-failed kms-agent || return 1
        sleep 0.2
    done
}

start() {
    begun=$(date +%s)
    systemctl daemon-reload
    systemctl reset-failed kms-agent 2>/dev/null || true
    systemctl restart kms-agent && wait_for_ping
}

systemctl enable kms-agent >/dev/null 2>&1 || say "warning: could not enable the unit"
if [ -z "$restart" ] && ping_agent; then
    say "$version is installed and running; nothing had to be done"
elif start; then
    say "$version is running on port $port${old_version:+ (it was $old_version before)}"
else
    say "$version does not answer on port $port. Its log says:" >&2
    journalctl --unit kms-agent --since "@$begun" --lines 20 --no-pager --output cat >&2 2>/dev/null || true
    if [ -n "$old_version" ] && [ -n "$restart" ]; then
        put_back
        ! start || fail "the upgrade was rolled back to $old_version, which is running"
        fail "the upgrade was rolled back to $old_version, which does not answer either"
    fi
    undo=''
    fail "the agent is installed but does not serve: see 'journalctl -u kms-agent', then run this script again"
fi
undo=''

[ -z "$no_check" ] || exit 0
"$home/bin/kms-agent" check --config "$config" || {
    say "the agent is running, but applications may not get secrets yet: see FAILED above, and check again with 'kms-agent check'"
    exit 3
}
