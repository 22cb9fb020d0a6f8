#!/bin/sh
# What is needed of the machine beside Python and make: `venv`; with `maven` as second argument also Maven, which
# fetches the jars of test servers (the demo needs none of them).
# Installs it where it may (root on Debian or Ubuntu), says what to install elsewhere. Quick when nothing is missing.
set -eu

python=${1:-python3}
missing=

"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="python3-venv"
[ "${2-}" != maven ] || command -v mvn >/dev/null || missing="$missing maven"

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
