"""All that the paper has beside ReCLIP++: other systems, measures, figures, its numbers, their reproduction.

    systems.py      the other systems and ablations, as parts that are handed to rectify.py and distill.py
    windows.py      Eq. 6's windows in one pass of CLIP instead of 121
    run.py          `python paper/run.py no-bias` trains, distils and measures one of them
    scores.py       class and space preference, linear probe, how right the hypotheses are
    bias.py         what a bias map says, and what it is worth at test
    figures.py      the paper's figures
    released.py     the authors' files: imports their rectification, writes hypotheses in their form
    reported.py     what the paper reports: tables, figures and claims, as data
    tables.py       ours beside the paper's, and which claims held, as Markdown
    reproduce.py    runs what a table, figure or claim needs
    results/        what that gave
"""
