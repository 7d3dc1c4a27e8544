"""The actor: the policy in Megatron, its passes over batches, and its optimizer."""

import warnings

# Each module of megatron-core warns about missing optional packages; `platform.describe` reports them in one line.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
