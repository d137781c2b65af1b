"""Train an image tokenizer on a frozen encoder: continuous or discrete, DINO-Tok or VFMTok.

    python training_scripts/train_tokenizer.py --model RECIPE --dataset PICTURES --output_dir runs/tokenizer

The model is a recipe (JSON: the class, the frozen encoder and the constructor's arguments) or a tokenizer to go on
from. A new one is first fitted in closed form. Run the script under `accelerate launch` or `torchrun` for several
processes; README.md beside it has the recipes of the papers. Everything a run needs to go on, or to be run again, is
in its output folder.
"""

FIT_PICTURES = 4096
WARMUP_SHARE, MAX_GRADIENT_NORM = 0.02, 1.0
DISCRIMINATOR_WARMUP, DISCRIMINATOR_RAMP = 500, 1000  # steps alone, and steps until its weight is full
LOSSES = ("l1", "l2", "lpips", "adversarial", "semantic", "codebook")
