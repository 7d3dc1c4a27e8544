"""The Megatron side: platform, layout, model building, the training step."""

import warnings

# Module by module, megatron-core warns of what is not installed; `platform.describe` says it in one line.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
