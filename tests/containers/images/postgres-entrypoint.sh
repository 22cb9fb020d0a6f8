#!/bin/bash
# What the official image's entry point does, as far as compose/ and delta_sync.testing need it.
set -euo pipefail

if [ "${1-}" != postgres ]; then exec "$@"; fi
: "${POSTGRES_USER:=postgres}" "${POSTGRES_PASSWORD:?is needed}"
: "${POSTGRES_DB:=$POSTGRES_USER}"
mkdir -p "$PGDATA" /var/run/postgresql
chown -R postgres "$PGDATA" /var/run/postgresql
chmod 700 "$PGDATA"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    install --owner postgres --mode 600 /dev/null /tmp/password
    printf '%s\n' "$POSTGRES_PASSWORD" >/tmp/password
    gosu postgres initdb --username "$POSTGRES_USER" --pwfile /tmp/password --encoding UTF8 \
        --locale C.UTF-8 --auth-local trust --auth-host scram-sha-256 --pgdata "$PGDATA" >/dev/null
    rm /tmp/password
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    gosu postgres pg_ctl --pgdata "$PGDATA" --wait --options "-c listen_addresses=''" start
    [ "$POSTGRES_DB" = postgres ] ||
        gosu postgres psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
            --command "CREATE DATABASE \"$POSTGRES_DB\""
    for file in /docker-entrypoint-initdb.d/*.sql; do
        [ -e "$file" ] || continue
        gosu postgres psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <"$file"
    done
    gosu postgres pg_ctl --pgdata "$PGDATA" --mode fast --wait stop
    echo "PostgreSQL init process complete; ready for start up."
fi
exec gosu postgres "$@" -c listen_addresses='*'
