#!/bin/bash
# A run on TPU slices of a GKE cluster that xpk made:
#
#   CLUSTER=my-cluster IMAGE=my-registry/luthier launch/xpk.sh RECIPE key=value ... base_output_directory=gs://...
#   CLUSTER=... IMAGE=... COMMAND=rl TPU=v5p-128 SLICES=2 launch/xpk.sh RECIPE key=value ... dcn_data_parallelism=2
#
# IMAGE holds the recipe and luthier[tpu,gcs]. JAX finds the processes by what GKE tells each host. A workload that is
# preempted or loses a host is started again, and goes on from its last checkpoint.

set -euo pipefail

printf -v arguments ' %q' "$@"

xpk workload create \
  --cluster="${CLUSTER:?name the cluster: CLUSTER=...}" \
  --workload="${NAME:-luthier}" \
  --docker-image="${IMAGE:?name an image with luthier in it: IMAGE=...}" \
  --tpu-type="${TPU:-v6e-16}" \
  --num-slices="${SLICES:-1}" \
  --max-restarts="${RESTARTS:-20}" \
  --command="luthier ${COMMAND:-sft}$arguments"
