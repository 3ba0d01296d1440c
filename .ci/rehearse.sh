#!/usr/bin/env bash
# Builds the Dockerfile's CPU target and uses the image as its users do, where there is no Docker engine and no registry of
# images: with podman, on a base image made from Debian's packages. `make container`, as root; needs podman, runc and
# debootstrap (all Debian's).
#   BUILD_OPTIONS='--volume /srv/wheels:/srv/wheels:ro'   more options for `podman build`
#   RUNTIME=crun                                          where runc is not what podman should use
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TAG=kimi-vllm:rehearsal NAME=kimi-vllm-rehearsal WAIT_SECONDS=300
readonly STAND_IN=localhost/python:3.11-slim-bookworm
readonly RUNTIME=${RUNTIME:-runc} # crun refuses machines with both versions of cgroups
readonly PACKAGES=ca-certificates,python3,python3-pip,python3-venv
read -ra OPTIONS <<<"${BUILD_OPTIONS:-}"

fail() {
  printf 'container: %s\n' "$*" >&2
  exit 1
}

say() {
  printf 'container: %s\n' "$*"
}

need() {
  command -v "$1" >/dev/null || fail "needs $1: apt-get install $2"
}

make_stand_in() {
  local folder
  podman image exists "$STAND_IN" && return
  need debootstrap debootstrap
  say "a base image from Debian's packages in place of python:3.11-slim-bookworm, once"
  folder=$(mktemp -d)
  debootstrap --variant=minbase "--include=$PACKAGES" bookworm "$folder" >"$folder.log" || fail "see $folder.log"
  ln -s /usr/bin/python3 "$folder/usr/local/bin/python"
  tar --create --numeric-owner --directory "$folder" . | podman import --quiet - "$STAND_IN" >/dev/null
  rm -rf "$folder" "$folder.log"
}

inside() {
  podman exec "$NAME" "$@"
}

expect() { # expect WHAT WANTED FOUND
  [[ $3 == "$2" ]] || fail "$1: expected $2, found $3"
  say "$1: $3"
}

use() {
  # Without a network: what the server needs it has, and the port cannot be taken.
  # Limits below podman's own, for a root that may not raise them; no timer for the health check, which would be systemd's.
  podman --runtime "$RUNTIME" run --detach --name "$NAME" --network none --shm-size=1g --health-interval=disable \
    --ulimit nofile=16384:16384 --ulimit nproc=4096:4096 "$TAG" >/dev/null
  trap 'podman rm --force --time 5 --volumes "$NAME" >/dev/null' EXIT
  local started=$SECONDS
  until podman healthcheck run "$NAME" >/dev/null 2>&1; do
    [[ $(podman inspect --format '{{.State.Running}}' "$NAME") == true ]] || fail "ended: $(podman logs --tail 20 "$NAME" 2>&1)"
    ((SECONDS - started < WAIT_SECONDS)) || fail "not healthy after $WAIT_SECONDS s: $(podman logs --tail 20 "$NAME" 2>&1)"
    sleep 2
  done
  say "HEALTHCHECK: healthy after $((SECONDS - started)) s"
  expect "listens on all addresses, port 8000" 1 "$(inside grep -c ' 00000000:1F40 .* 0A ' /proc/net/tcp)"
  expect "user" 10001 "$(inside id -u)"
  expect "processes of root" 0 "$(podman top "$NAME" user | grep -c '^root' || true)"
  # shellcheck disable=SC2016  # to be expanded inside
  expect "HF_HOME is a volume the user can write to" /models "$(inside sh -c 'touch "$HF_HOME/written" && mountpoint -q "$HF_HOME" && echo "$HF_HOME"')"
  expect "answer" 2 "$(inside curl -fsS http://127.0.0.1:8000/v1/completions --header 'Content-Type: application/json' \
    --data '{"model": "kimi-recall", "prompt": "a=7 k=2 m=5 ? k →", "max_tokens": 8, "temperature": 0}' |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["text"].strip())')"
  podman stop --time 60 "$NAME" >/dev/null
  expect "status after SIGTERM" 0 "$(podman inspect --format '{{.State.ExitCode}}' "$NAME")"
}

main() {
  [[ $(id -u) == 0 ]] || fail "needs root, for debootstrap and podman's storage"
  need podman podman
  need "$RUNTIME" "$RUNTIME"
  make_stand_in
  say "building the CPU target"
  # Docker's format: the other one has no HEALTHCHECK.
  podman --runtime "$RUNTIME" build --format docker --network host --pull=never --target cpu --tag "$TAG" "${OPTIONS[@]}" . ||
    fail "the build failed; a machine's own certificates or wheels come in with BUILD_OPTIONS"
  use
  say "all of it works"
}

main
