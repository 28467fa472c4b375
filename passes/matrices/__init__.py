"""Weight matrices of passes: their stored forms, quantization, and least-squares fits."""
