"""Everything that the paper has beside ReCLIP++: other systems, measures, figures, its numbers, and their reproduction.

    systems.py      the other systems and ablations, as parts that are handed to rectify.py and distill.py
    run.py          `python paper/run.py no-bias` trains, distils and measures one of them
    scores.py       class and space preference, linear probe, how right the hypotheses are
    figures.py      the paper's figures
    numbers.py      what the paper reports: tables, figures and claims, as data
    reproduce.py    runs what a table, figure or claim needs, and shows ours beside the paper's
    results/        what that gave
"""
