#!/usr/bin/env bash
# One node's part of a torchtune run on several nodes; start it on every node with the same HEAD.
#
#   HEAD=node0:29500 NODES=4 GPUS=8 docs/launch/tune.sh mdm_full_finetune --config llada/8B_full \
#       output_dir=/shared/run
#
# The same command starts the run, and goes on with it from its last checkpoint after any stop. A rank
# that dies is started again with all others, up to three times. SIGTERM has the run saved first: it
# has nine minutes for that (SAVING, in seconds). The torchrun of torch 2.11 gives it 30
# seconds, and has no option to give it more.
set -euo pipefail
# torchrun else lets ranks that are started again read the addresses of those that died (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
options=$(torchrun --help)
if [[ $options == *shutdown_timeout* ]]; then
    set -- --shutdown_timeout "${SAVING:-540}" "$@"
else
    echo "tune.sh: after SIGTERM the run has 30 seconds to save, whatever SAVING says: torch 2.12 gives it more" >&2
fi
exec tune run --nnodes "${NODES:?}" --nproc_per_node "${GPUS:-8}" --max_restarts "${RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:?name a node and port}" --rdzv_id "${JOB:-mdm}" "$@"
