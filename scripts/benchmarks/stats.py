# SPDX-License-Identifier: Apache-2.0
"""Medians, quartiles, and tables of them."""


def quantile(values, q):
    """The q-quantile, linear between the two nearest values."""
    values = sorted(values)
    at = q * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def summary(values):
    """Count, minimum, quartiles and maximum; None where nothing was measured."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return {
        "n": len(values),
        "min": min(values),
        "q1": quantile(values, 0.25),
        "median": quantile(values, 0.5),
        "q3": quantile(values, 0.75),
        "max": max(values),
    }


COLUMNS = ("n", "min", "q1", "median", "q3", "max")


def print_table(title, unit, rows):
    """Prints rows of (label, values)."""
    width = max([len(label) for label, _ in rows] + [len(title) + len(unit) + 2])
    print(f"\n{title + ', ' + unit:<{width}}" + "".join(f"{column:>10}" for column in COLUMNS))
    for label, values in rows:
        found = summary(values)
        if found is None:
            print(f"{label:<{width}}  not measured")
            continue
        cells = [f"{found['n']:>10}"] + [f"{found[column]:>10.2f}" for column in COLUMNS[1:]]
        print(f"{label:<{width}}" + "".join(cells))
