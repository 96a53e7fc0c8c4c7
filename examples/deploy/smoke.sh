#!/usr/bin/env bash
# Does an image answer from a compressed context? Needs Docker, and a GPU unless GPUS is empty:
#
#     examples/deploy/smoke.sh vllm-kv-compress:v0.33.0
#     GPUS= examples/deploy/smoke.sh vllm-kv-compress:v0.33.0     # on the CPU platform of this plugin
set -euo pipefail
image=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
gpus=${GPUS-all}
container=$(docker run --detach --rm ${gpus:+--gpus "$gpus"} --shm-size 1g --volume "$root:/repository:ro" \
  "$image" /repository/models/tiny --served-model-name tiny --kv-compress ratio=8 \
  --kv-cache-memory-bytes 64M --enforce-eager)
trap 'docker stop "$container" >/dev/null' EXIT
for _ in $(seq 120); do
  docker exec "$container" curl --fail --silent http://127.0.0.1:8000/health && break
  sleep 2
done
# Inside the image: its own client, and no port of this machine.
answer=$(docker exec --workdir /repository/examples "$container" python3 openai_client.py)
echo "$answer"
grep -q '^4923853 (76 blocks of KV cache before compression, 11 after)' <<<"$answer"
