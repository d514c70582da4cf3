"""What there is without any network: logistic regression on raw pixels, by scikit-learn."""

import numpy as np
import numpy.typing as npt

from gaisnet.data.images import ImageData, Images

_MAX_STEPS = 2000  # of L-BFGS; it converges in a tenth of them


def pixel_accuracy(data: ImageData) -> float:
    """Share of the held-out images that a logistic regression on grey values between 0 and 1 tells, once it learned.

    Its penalty is scikit-learn's own (C = 1): on draws of 5 to 50 of a label, ten times more or less of it changes
    accuracy by two points at most.
    """
    from sklearn.linear_model import LogisticRegression  # an extra: whoever reads digits has it

    model = LogisticRegression(max_iter=_MAX_STEPS).fit(_grey_of(data.train), data.train.labels_N.numpy())
    return float(model.score(_grey_of(data.test), data.test.labels_N.numpy()))


def _grey_of(images: Images) -> npt.NDArray[np.float64]:
    return images.grey_NHW.flatten(1).numpy() / np.float64(255)
