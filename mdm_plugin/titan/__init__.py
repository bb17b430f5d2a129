"""torchtitan's side: the same samplers, masks and loss in its Trainer, for runs of many machines.

    torchrun --nproc_per_node 8 -m torchtitan.train --module mdm_plugin.titan.llada \
        --config llada_8b_sft

Needs ``pip install 'mdm-plugin[titan]'``. Only this package knows torchtitan.
"""

import importlib.util

from mdm_plugin.errors import UserError

if importlib.util.find_spec("torchtitan") is None:
    raise UserError(
        "mdm_plugin.titan needs torchtitan: pip install 'mdm-plugin[titan]' "
        "(the torchtune recipes do not)"
    )

from mdm_plugin.titan import compat

compat.apply()
