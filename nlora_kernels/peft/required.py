"""What must be installed for the modules beside this one: importing it raises ImportError where it is not."""

import importlib.util

from .. import versions

# NOTE: looked for and not imported: importing versions that do not fit ends in errors of their own.
for _name in ("peft", "transformers"):
    if importlib.util.find_spec(_name) is None:
        raise ImportError(f"nlora_kernels.peft needs {_name}: pip install 'nlora_kernels[peft]'")
versions.check("peft", "peft", "transformers")
