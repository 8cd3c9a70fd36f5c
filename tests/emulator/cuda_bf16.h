// In place of the toolkit's header, for sources that include it by name.
#include "emulate.h"
