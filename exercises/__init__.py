"""Exercises for a course: functions of this project to be written anew, with checks and marks.

    README.md      the exercises; in the full project also a part for lecturers
    ladder.py      the one description of them, as data; all else here is derived from it
    check.py       `python exercises/check.py`: what is right so far, in the hand-out as in the full project
    checks.py      what it checks: properties and small worked numbers, no solutions
    probes.py      the small CLIP and the stand-ins that the checks work with
    report.py      the table, and results.json for Gradescope
    sources.py     finds functions in source text, blanks them, puts others in, finds what gives them away

For lecturers alone, and in no hand-out:

    handout.py     `python exercises/handout.py OUT`: the project without solutions
    grade.py       `python exercises/grade.py SUBMISSION`: the hidden tests, marks
    hidden.py      their inputs
    worker.py      runs a submission's functions on them, in a process of its own
    lecture.py     `python exercises/lecture.py`: makes lecture.md, the method in pictures of a real run
"""
