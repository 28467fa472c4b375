"""The dialect as TensorRT plugins with their kernels embedded: engines that need neither Python nor a plugin library.

`prepare(graph)` makes the dialect's nodes those of plugins, and says which must stay standard ops. `register(names)`
declares the plugins in the process that builds, before its parser reads the graph. Whatever a plugin declares comes
from its op's one declaration (`trimtab.plugins.dialect.Op`) and its one kernel (`trimtab.plugins.gpu.GpuKernel`).
"""

from trimtab.plugins.tensorrt.names import PLUGINS, Plugin, plugins_of
from trimtab.plugins.tensorrt.prepare import Prepared, prepare
from trimtab.plugins.tensorrt.register import missing, register

__all__ = ["PLUGINS", "Plugin", "Prepared", "missing", "plugins_of", "prepare", "register"]
