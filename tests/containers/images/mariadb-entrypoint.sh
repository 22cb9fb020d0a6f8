#!/bin/bash
# What the official image's entry point does, as far as delta_sync.testing needs it.
set -euo pipefail

: "${MARIADB_ROOT_PASSWORD:?is needed}" "${MARIADB_USER:?is needed}" "${MARIADB_PASSWORD:?is needed}"
if [ "${1-}" = mariadbd ]; then shift; fi # options alone are the server's, too
mkdir -p /run/mysqld
chown -R mysql /var/lib/mysql /run/mysqld
if [ ! -d /var/lib/mysql/mysql ]; then
    gosu mysql mariadb-install-db --no-defaults --datadir=/var/lib/mysql --auth-root-authentication-method=normal \
        --skip-test-db --skip-log-bin >/dev/null
fi
cat >/tmp/first.sql <<END
CREATE DATABASE IF NOT EXISTS $MARIADB_DATABASE;
CREATE USER IF NOT EXISTS root@'%' IDENTIFIED BY '$MARIADB_ROOT_PASSWORD';
GRANT ALL ON *.* TO root@'%' WITH GRANT OPTION;
CREATE USER IF NOT EXISTS $MARIADB_USER@'%' IDENTIFIED BY '$MARIADB_PASSWORD';
END
exec gosu mysql mariadbd --no-defaults --datadir=/var/lib/mysql --init-file=/tmp/first.sql --bind-address=0.0.0.0 "$@"
