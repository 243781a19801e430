/* A page of a mapped file that cannot be read any more, since the file was cut short or its disk failed, ends a process
 * by a signal and without a word. Here it ends with a sentence and an exit code.
 */
#include <signal.h>
#include <string.h>
#include <unistd.h>

static char sentence[2048];
static size_t length;
static int code;

static void end(int number)
{
    (void)number;
    ssize_t written = write(STDERR_FILENO, sentence, length);
    (void)written;
    _exit(code);
}

/* From now on, say `text` and end with `exit_code` where a mapped file cannot be read. */
void end_on_bus_error(const char *text, int exit_code)
{
    length = strlen(text);
    if (length >= sizeof sentence)
        length = sizeof sentence - 1;
    memcpy(sentence, text, length);
    code = exit_code;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = end;
    sigaction(SIGBUS, &action, NULL);
}
