#!/bin/bash
# Sees to it that the Docker engine has images: as they are there, else pulled, else built here under the same names.
#   usage: images.sh [IMAGE…]    (without one: all that the tests here use)
#
# For machines that reach package mirrors and no registry of images. What is built is a stand-in: Debian 12 by debootstrap,
# with Debian's PostgreSQL, Redis and Python, and the Java servers of delta_sync.testing (`make jars`), behind entry
# points that understand what compose/ and delta_sync.testing tell the official ones. Versions are not those of the
# names, which a label says: docker image ls --filter label=delta.stand-in
set -euo pipefail

here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
root=$(CDPATH='' cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export DOCKER_BUILDKIT=0 # the older builder is in every engine, and needs no plugin
PULL_TIMEOUT=${DELTA_PULL_TIMEOUT_S:-900}

label() { docker image inspect --format '{{index .Config.Labels "delta.stand-in"}}' "$1" 2>/dev/null; }

# build IMAGE FOLDER: a stand-in, from the Dockerfile on standard input. Each time anew: what is as it was comes out of
# the builder's cache.
build() {
    echo "building a stand-in for $1" >&2
    docker build --quiet --network host --label delta.stand-in=yes --tag "$1" --file - "$2" >/dev/null
}

debian() {
    ! docker image inspect delta-stand-in-debian:12 >/dev/null 2>&1 || return 0
    if ! PATH="$PATH:/usr/sbin" command -v debootstrap >/dev/null; then
        [ "$(id -u)" = 0 ] || { echo "Only root can make images out of nothing; load them: docker load" >&2; exit 1; }
        apt-get update -q >&2
        apt-get install -q -y --no-install-recommends debootstrap >&2
    fi
    echo "debootstrap: Debian 12 (a minute)" >&2
    local place authorities=/etc/ssl/certs/ca-certificates.crt
    place=$(mktemp -d)
    PATH="$PATH:/usr/sbin" debootstrap --variant=minbase --include=ca-certificates bookworm "$place/root" \
        >"$place/log" || { tail -n 20 "$place/log" >&2; exit 1; }
    # A company's own authorities, where there are any: packages come through its proxies.
    cp /usr/local/share/ca-certificates/*.crt "$place/root/usr/local/share/ca-certificates/" 2>/dev/null || true
    chroot "$place/root" update-ca-certificates >/dev/null 2>&1
    rm -rf "$place"/root/var/cache/apt/archives/*.deb "$place"/root/var/lib/apt/lists/*
    tar -C "$place/root" -c --numeric-owner --one-file-system . | docker import --change 'CMD ["bash"]' \
        --change "ENV SSL_CERT_FILE=$authorities PIP_CERT=$authorities" - delta-stand-in-debian:12 >/dev/null
    rm -rf --one-file-system "$place"
}

# The scripts of images/, and what they use.
server() {
    [ -z "${server_built-}" ] || return 0
    server_built=yes
    debian
    build delta-stand-in-server:12 "$here/images" <<'END'
FROM delta-stand-in-debian:12
RUN apt-get update -q && apt-get install -q -y --no-install-recommends curl gosu procps socat \
    && rm -rf /var/lib/apt/lists/*
COPY . /usr/local/bin/
END
}

java() {
    [ -z "${java_built-}" ] || return 0
    java_built=yes
    server
    build delta-stand-in-java:12 \
        "$("$python" -c 'from delta_sync.testing import jars; print(jars.java().removesuffix("/bin/java"))')" <<'END'
FROM delta-stand-in-server:12
COPY . /opt/java/
ENV PATH=/opt/java/bin:$PATH
RUN useradd --uid 1000 --create-home app
END
}

# Where the jars of a test server are.
jars() { "$python" -c "from delta_sync.testing import jars; print(jars.class_path('$1').partition('/*')[0])"; }

stand_in() {
    case $1 in
    python:*)
        debian
        build "$1" "$here/images" <<'END'
FROM delta-stand-in-debian:12
RUN apt-get update -q && apt-get install -q -y --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/* && ln -s /usr/bin/python3 /usr/local/bin/python
CMD ["python3"]
END
        ;;
    postgres:*)
        server
        build "$1" "$here/images" <<'END'
FROM delta-stand-in-server:12
RUN apt-get update -q && apt-get install -q -y --no-install-recommends postgresql-common \
    && echo "create_main_cluster = false" >>/etc/postgresql-common/createcluster.conf \
    && apt-get install -q -y --no-install-recommends postgresql && rm -rf /var/lib/apt/lists/* \
    && ln -s "$(echo /usr/lib/postgresql/*)" /opt/postgresql
ENV PATH=/opt/postgresql/bin:$PATH PGDATA=/var/lib/postgresql/data
VOLUME ["/var/lib/postgresql/data"]
EXPOSE 5432
STOPSIGNAL SIGINT
ENTRYPOINT ["postgres-entrypoint.sh"]
CMD ["postgres"]
END
        ;;
    redis:*)
        server
        build "$1" "$here/images" <<'END'
FROM delta-stand-in-server:12
RUN apt-get update -q && apt-get install -q -y --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/*
VOLUME ["/data"]
WORKDIR /data
EXPOSE 6379
ENTRYPOINT ["redis-entrypoint.sh"]
CMD ["redis-server"]
END
        ;;
    mariadb:*)
        server
        build "$1" "$here/images" <<'END'
FROM delta-stand-in-server:12
RUN apt-get update -q && apt-get install -q -y --no-install-recommends mariadb-server-core mariadb-client-core \
    && rm -rf /var/lib/apt/lists/* && useradd --uid 999 --no-create-home mysql
VOLUME ["/var/lib/mysql"]
EXPOSE 3306
ENTRYPOINT ["mariadb-entrypoint.sh"]
CMD ["mariadbd"]
END
        ;;
    apache/kafka:*)
        java
        build "$1" "$(jars kafka)" <<'END'
FROM delta-stand-in-java:12
COPY *.jar /opt/kafka/libs/
RUN mkdir -p /opt/kafka/bin && cd /opt/kafka/bin \
    && for tool in storage:kafka.tools.StorageTool server-start:kafka.Kafka; do \
        printf '#!/bin/sh\nexec java ${KAFKA_HEAP_OPTS:--Xmx256m} %s -cp "/opt/kafka/libs/*" %s "$@"\n' \
            "-XX:+UseSerialGC -XX:TieredStopAtLevel=1" "${tool#*:}" >kafka-${tool%%:*}.sh; done \
    # Not among the jars of a broker; all that is asked of it is whether one answers.
    && printf '#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/9092\n' >kafka-broker-api-versions.sh \
    && chmod +x *.sh && install -d -o app -g app /var/lib/kafka/data /opt/kafka/config
USER app
VOLUME ["/var/lib/kafka/data"]
EXPOSE 9092
CMD ["kafka-entrypoint.sh"]
END
        ;;
    apicurio/apicurio-registry:*)
        java
        build "$1" "$("$python" -c "from delta_sync.testing import jars; print(jars.archive('apicurio'))")" <<'END'
FROM delta-stand-in-java:12
COPY . /opt/registry/
USER app
WORKDIR /home/app
EXPOSE 8080
CMD ["java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-jar", "/opt/registry/quarkus-run.jar"]
END
        ;;
    mongo:*)
        java
        build "$1" "$(jars mongodb)" <<'END'
FROM delta-stand-in-java:12
COPY . /opt/mongo/
# All that is asked of it is whether the server answers.
RUN printf '#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/27017\n' >/usr/local/bin/mongosh && chmod +x /usr/local/bin/mongosh
VOLUME ["/data/db"]
EXPOSE 27017
CMD ["forwarded.sh", "27017", "java", "-Xmx256m", "-XX:+UseSerialGC", "-cp", "/opt/mongo/*:/opt/mongo/classes", \
    "MongoLauncher", "27018", "/data/db/data.mv"]
END
        ;;
    opensearchproject/opensearch:*)
        java
        build "$1" "$(jars opensearch)" <<'END'
FROM delta-stand-in-java:12
COPY . /opt/opensearch/
VOLUME ["/usr/share/opensearch/data"]
EXPOSE 9200
CMD ["forwarded.sh", "9200", "java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", \
    "-Djava.locale.providers=CLDR,SPI", "-cp", "/opt/opensearch/*:/opt/opensearch/classes", \
    "OpenSearchLauncher", "/usr/share/opensearch/data", "9201"]
END
        ;;
    *)
        echo "$1 cannot be pulled, and there is no stand-in for it" >&2
        return 1
        ;;
    esac
}

if [ "$#" = 0 ]; then
    # What compose/ is built from, and what delta_sync.testing starts.
    # shellcheck disable=SC2046 # several words are several images
    set -- $(sed -n 's/^FROM \(python:[^ ]*\).*/\1/p' "$root/compose/Dockerfile.worker" | sort -u) \
        $("$python" -c 'from delta_sync.testing.containers import IMAGES; print(*IMAGES.values())')
fi
for image in "$@"; do
    if kind=$(label "$image") && [ -z "$kind" ]; then
        echo "$image: the official one"
    elif [ -z "$kind" ] && timeout "$PULL_TIMEOUT" docker pull --quiet "$image" >/dev/null 2>&1; then
        echo "$image: the official one, pulled"
    else
        stand_in "$image"
        echo "$image: a stand-in"
    fi
done
