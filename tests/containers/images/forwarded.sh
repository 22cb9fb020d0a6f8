#!/bin/bash
# Runs a server that listens on 127.0.0.1 only, on the port after the one that others are to reach it at.
#   usage: forwarded.sh PORT COMMAND…
set -euo pipefail

port=$1
shift
socat "TCP-LISTEN:$port,bind=$(hostname -i | cut -d ' ' -f 1),fork,reuseaddr" "TCP:127.0.0.1:$((port + 1))" &
socat "TCP-LISTEN:$port,bind=127.0.0.1,fork,reuseaddr" "TCP:127.0.0.1:$((port + 1))" &
exec "$@"
