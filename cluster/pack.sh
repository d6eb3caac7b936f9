#!/bin/sh
# Put what machines of a cluster get from here into cluster/mount: the commit that is checked out, and Ray's token.
#   sh cluster/pack.sh
# A clone of the commit has what an upload of files lacks: the commit's name, which goes into every result.
set -eu
umask 077 # the token is a key to the cluster
cd "$(dirname "$0")/.."
mkdir -p cluster/mount
git bundle create -q cluster/mount/zeroflow.bundle HEAD
ray get-auth-token --generate >cluster/mount/auth_token
cp cluster/onprem.env cluster/mount/onprem.env
git diff --quiet HEAD || echo "changes that are not committed do not go along; or submit with --working-dir ." >&2
echo "commit $(git rev-parse HEAD) is ready for ray up"
