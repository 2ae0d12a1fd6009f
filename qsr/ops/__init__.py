"""Operations: submitting jobs, showing their status, checking machines (doctor).

May import: everything.
"""
