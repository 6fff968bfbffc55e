#!/usr/bin/env bash
# Builds the CPU image, starts it as SageMaker would, waits for /ping, asks one question, stops it in time.
#   scripts/test_image.sh [options of docker build]
# MODEL=DIRECTORY serves that model in place of the image's demo model.
set -euo pipefail
cd "$(dirname "$0")/.."

engine=$(command -v docker || command -v podman || true)
if [ -z "$engine" ] || ! "$engine" info >/dev/null 2>&1; then
  echo "SKIPPED: no container engine"
  exit 0
fi
scripts/build_image.sh cpu "$@"

options=(--detach --publish 127.0.0.1::8080 --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges)
if [ -n "${MODEL-}" ]; then options+=(--volume "$(realpath "$MODEL"):/opt/ml/model:ro"); fi
container=$("$engine" run "${options[@]}" weir:cpu serve)
trap '"$engine" rm --force "$container" >/dev/null' EXIT
address=$("$engine" port "$container" 8080/tcp | head -1)

echo "==> Waiting for http://$address/ping"
for attempt in $(seq 120); do
  if [ "$(curl --silent --output /dev/null --write-out '%{http_code}' "http://$address/ping")" = 200 ]; then break; fi
  if [ "$attempt" = 120 ] || [ "$("$engine" inspect --format '{{.State.Running}}' "$container")" != true ]; then
    "$engine" logs "$container" >&2
    echo "the container never became ready" >&2
    exit 1
  fi
  sleep 1
done

echo "==> POST /invocations"
curl --silent --show-error --fail "http://$address/invocations" --header 'Content-Type: application/json' \
  --data '{"inputs": "Hello", "parameters": {"max_new_tokens": 8}}'
echo

echo "==> Stopping: SageMaker gives 30 seconds"
"$engine" stop -t 30 "$container" >/dev/null
code=$("$engine" inspect --format '{{.State.ExitCode}}' "$container")
if [ "$code" = 137 ]; then echo "the container had to be killed" >&2; exit 1; fi
echo "image: ok (exit code $code)"
