"""What measurements stand on: fair timing, peak memory, the attentions to compare with, the check that comes before a time.

`timing` and `memory` know nothing of attention; `case`, `peers`, `paper` and `check` say what is compared and when it is right;
`report` makes tables and pictures of the rows; `provenance` goes into every result file.
"""
