#!/bin/sh
# Runs a command where a Docker engine answers: the machine's own, or else one that lives as long as the command, with its
# images in .cache/docker, so that the next time they are there.    usage: engine.sh COMMAND [ARGUMENT…]
# On Debian and Ubuntu it installs the engine if it may (root), elsewhere it says what to install.
set -eu

PATH="$PATH:/usr/sbin:/sbin"
answers() { docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

missing=
answers || command -v dockerd >/dev/null || missing="docker.io iptables"
docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null || missing="$missing docker-compose"
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        # shellcheck disable=SC2086 # several words are several packages
        apt-get install -q -y --no-install-recommends $missing
    else
        echo "Please install (Debian's package names): $missing" >&2
        exit 1
    fi
fi

answers && exec "$@"
if [ "$(id -u)" != 0 ]; then
    echo "No Docker engine answers, and only root can start one. Start yours: systemctl start docker" >&2
    exit 1
fi

home="$(CDPATH='' cd "$(dirname "$0")/../.." && pwd)/.cache/docker"
# Sockets' paths are short (108 bytes), clones' are not.
run=$(mktemp -d /tmp/delta-docker-XXXXXX)
mkdir -p "$home"
DOCKER_HOST="unix://$run/docker.sock"
export DOCKER_HOST
dockerd --data-root "$home" --exec-root "$run/run" --pidfile "$run/pid" --host "$DOCKER_HOST" >"$run/log" 2>&1 &
engine=$!
finish() {
    status=$?
    trap - EXIT INT TERM
    kill "$engine" 2>/dev/null || true
    wait "$engine" || true
    umount "$run/run/netns/default" 2>/dev/null || true # it may leave that mounted
    rm -rf "$run"
    exit "$status"
}
trap finish EXIT INT TERM
tries=0
until answers; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$engine" 2>/dev/null; then # 60 s; it takes one
        echo "The Docker engine did not start; its log ends:" >&2
        tail -n 20 "$run/log" >&2
        exit 1
    fi
    sleep 0.2
done
"$@"
