"""What the four training scripts share: data, metrics, plotting, records. No method lives here."""

import logging
import warnings

# What users can do nothing about: an optional kernel for CPUs, and names that transformers will drop in version 6.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
