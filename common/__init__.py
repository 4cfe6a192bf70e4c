"""What the four training scripts share: data, metrics, plotting, records. No method lives here."""
