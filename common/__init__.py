"""What the four training scripts share: data, metrics, plotting, records. No method lives here."""

import logging
import warnings

# What no user can change: which 4-bit kernels bitsandbytes finds for a CPU, and what libraries call in transformers.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
