#!/bin/bash
# The official image has no protected mode, and its server is not root.
set -euo pipefail

if [ "${1-}" != redis-server ]; then exec "$@"; fi
chown redis:redis /data
exec gosu redis "$@" --protected-mode no
