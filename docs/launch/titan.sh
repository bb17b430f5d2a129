#!/usr/bin/env bash
# One node's part of a torchtitan run on several nodes; start it on every node with the same HEAD.
#
#   HEAD=node0:29500 NODES=64 GPUS=8 docs/launch/titan.sh --module mdm_plugin.titan.llada \
#       --config llada_8b --dataloader.dataset_path /shared/text.jsonl --dump_folder /shared/run \
#       --parallelism.data_parallel_replicate_degree 8
#
# It goes on from the last checkpoint in dump_folder.
set -euo pipefail
# torchrun else lets ranks that are started again read the addresses of those that died (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "${NODES:?}" --nproc_per_node "${GPUS:-8}" --max_restarts "${RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:?name a node and port}" --rdzv_id "${JOB:-mdm}" \
    --local-ranks-filter 0 --role rank --tee 3 -m torchtitan.train "$@"
