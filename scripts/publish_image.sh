#!/usr/bin/env bash
# Puts an image into a repository of ECR, and lets it pass, or not, by what the scan there finds in it.
#   scripts/publish_image.sh KIND REPOSITORY_URI TAG
# weir:KIND becomes REPOSITORY_URI:TAG-KIND, a name that is given once. It leaves findings-KIND.json and
# imageDetail-KIND.json here. Where soci and skopeo are there, TAG-KIND-soci is the same image with an index by which a
# platform that can starts the container before all of the image has arrived.
# docker has to be logged in at the registry, and the account to be one that may push and read scans.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?cpu, cuda or rocm} repository_uri=${2:?a repository} tag=${3:?a tag}-$kind
repository=${repository_uri#*/}
image=$repository_uri:$tag
python=.venv/bin/python
[ -x $python ] || python=python3

ecr() { aws ecr "$@" --repository-name "$repository"; }
scan_status() {
  ecr describe-image-scan-findings --image-id "imageDigest=$digest" --no-paginate \
    --query imageScanStatus.status --output text 2>/dev/null || echo NOT_STARTED
}

if ecr describe-images --image-ids "imageTag=$tag" >/dev/null 2>&1; then
  echo "publish_image.sh: $image is there already, and a name is given once" >&2
  exit 1
fi
docker tag "weir:$kind" "$image"
docker push "$image"
read -r digest bytes < <(ecr describe-images --image-ids "imageTag=$tag" --output text \
  --query 'imageDetails[0].[imageDigest,imageSizeInBytes]')

# ECR scans what is pushed. A basic scan ends as COMPLETE, an enhanced one as ACTIVE; ten minutes are enough for both.
# Whatever else it ends as, the gate refuses.
for _ in $(seq 120); do
  case $(scan_status) in
    NOT_STARTED | PENDING | IN_PROGRESS) sleep "${SCAN_POLL_S:-5}" ;;
    *) break ;;
  esac
done
ecr describe-image-scan-findings --image-id "imageDigest=$digest" > "findings-$kind.json"
"$python" -m scripts.scan_gate "findings-$kind.json"

if command -v soci >/dev/null && command -v skopeo >/dev/null; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  # Docker keeps no layers as the registry has them, so they are fetched.
  skopeo copy "docker://$image" "oci-archive:$work/image.tar"
  soci convert --standalone "$work/image.tar" "$work/soci.tar"
  skopeo copy --all "oci-archive:$work/soci.tar" "docker://$image-soci"
else
  echo "NO SOCI INDEX for $image: that needs soci and skopeo" >&2
fi
printf '{"ImageURI":"%s","ImageDigest":"%s","CompressedBytes":%s}\n' "$image" "$digest" "$bytes" > "imageDetail-$kind.json"
