"""A trained network and its data, small enough to ship, so that every example runs on real numbers.

model = digits_network()      # DigitsNet with the shipped weights, eval mode
data = digits_data()          # train, calibration and held-out digits; needs scikit-learn
"""

from __future__ import annotations

from fxquant.demo.digits import TRAIN_IMAGES, DigitsData, digits_data, digits_split
from fxquant.demo.network import digits_network
from fxquant.demo.run import run_demo
from fxquant.demo.train import augmented, held_out_accuracy, trained
