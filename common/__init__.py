"""What the four training scripts share: data, metrics, plotting, records. No method lives here."""

import logging
import warnings

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # users need no other kernel for CPUs,
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # and cannot change what calls what
