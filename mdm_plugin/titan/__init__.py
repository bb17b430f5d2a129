"""torchtitan's side: the same samplers, masks and loss in its Trainer, for runs of many machines.

    torchrun … -m torchtitan.train --module mdm_plugin.titan.llada --config llada_8b_sft …

Needs ``pip install 'mdm-plugin[titan]'``. Only this package knows torchtitan.

May import: everything.
"""

import importlib.util

if importlib.util.find_spec("torchtitan") is None:
    raise ImportError("mdm_plugin.titan needs torchtitan: pip install 'mdm-plugin[titan]'")

from mdm_plugin.titan import compat

compat.apply()
