#!/bin/bash
# KAFKA_SOME_SETTING=value becomes some.setting=value, as in the official image.
set -euo pipefail

config=/opt/kafka/config/server.properties
env | grep '^KAFKA_' | grep -v '^KAFKA_HEAP_OPTS=' | while IFS='=' read -r name value; do
    key=${name#KAFKA_}
    key=${key//___/-}
    key=${key//__/%}
    key=${key//_/.}
    key=${key//%/_}
    echo "${key,,}=$value"
done >"$config"
/opt/kafka/bin/kafka-storage.sh format --ignore-formatted --cluster-id "${CLUSTER_ID:?is needed}" --config "$config"
exec /opt/kafka/bin/kafka-server-start.sh "$config"
