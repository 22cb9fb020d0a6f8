#!/bin/sh
# What is needed of the machine beside Python and make: `venv`; with `servers` as second argument also Maven, which
# fetches the jars of test servers, and MariaDB's programs (the demo needs none of them).
# Installs it where it may (root on Debian or Ubuntu), says what to install elsewhere. Quick when nothing is missing.
set -eu

python=${1:-python3}
missing=

"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="python3-venv"
if [ "${2-}" = servers ]; then
    command -v mvn >/dev/null || missing="$missing maven"
    PATH="$PATH:/usr/sbin" command -v mariadbd >/dev/null || missing="$missing mariadb-server-core mariadb-client-core"
fi

[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # shellcheck disable=SC2086 # several words are several packages
    apt-get install -q -y --no-install-recommends $missing
else
    echo "Please install (Debian's package names):" $missing >&2
    exit 1
fi
