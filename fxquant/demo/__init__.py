"""A trained network and its data, small enough to ship, so that every example runs on real numbers.

model = digits_network()      # DigitsNet with the shipped weights, eval mode
data = digits_data()          # train, calibration and held-out digits; needs scikit-learn
"""

from fxquant.demo.data import DigitsData, digits_data
from fxquant.demo.network import DigitsNet, digits_network

__all__ = ["DigitsData", "DigitsNet", "digits_data", "digits_network"]
