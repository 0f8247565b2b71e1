"""Midtraining from one experiment file: another run's weights, with a mixture and a schedule of their own.

    torchrun --nproc-per-node 8 train/midtrain.py --config configs/experiments/FILE.yaml
    python train/midtrain.py --config FILE.yaml model.from_pretrained=experiments/demo training.learning_rate=1e-4

The loop is that of pretraining. `model.from_pretrained` names a run (its newest checkpoint), one checkpoint of a run or
a Hugging Face folder; steps, the warm-up of the learning rate and the optimiser begin anew. The same command again goes
on where this run stopped, and signals do what they do there.
"""

from __future__ import annotations

from shards.errors import run_command
from train.pretrain import main

if __name__ == "__main__":
    run_command(lambda: main("midtrain", __doc__))
