"""``python -m godwit_operator``."""

from godwit_operator.main import main

if __name__ == "__main__":
    main()
