// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/control"
)

// inquiry are the flags of a command that asks the running instance.
type inquiry struct {
	socket, output string
	formats        []string // nil: the command has no -o
}

func (a *app) inquiryFlags(cmd *cobra.Command, q *inquiry, formats ...string) {
	q.formats = formats
	cmd.Flags().StringVar(&q.socket, "socket", "", "control `SOCKET` of the instance; default: admin.socket of the configuration")
	if len(formats) > 0 {
		cmd.Flags().StringVarP(&q.output, "output", "o", formats[0], "`FORMAT` of the output: "+strings.Join(formats, " or "))
		_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)) // The flag is there.
	}
	a.configFlags(cmd)
}

// ask calls f with a client of the instance. What f returns gets an exit code.
func (a *app) ask(cmd *cobra.Command, q *inquiry, f func(ctx context.Context, c *control.Client) error) error {
	if len(q.formats) > 0 && !slices.Contains(q.formats, q.output) {
		return fmt.Errorf("-o %s: expected %s", q.output, strings.Join(q.formats, " or "))
	}
	path, err := a.socket(q.socket)
	if err != nil {
		return err
	}
	c, err := control.Dial(path)
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	return askError(f(cmd.Context(), c))
}

// shortly is ask for an answer that comes at once.
func (a *app) shortly(cmd *cobra.Command, q *inquiry, f func(ctx context.Context, c *control.Client) error) error {
	return a.ask(cmd, q, func(ctx context.Context, c *control.Client) error {
		ctx, cancel := context.WithTimeout(ctx, answerTimeout)
		defer cancel()
		return f(ctx, c)
	})
}

// askError gives an error its exit code. To have been interrupted is none.
func askError(err error) error {
	var ce *codeError
	var ans *control.AnswerError
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return nil
	case errors.As(err, &ce):
		return err
	case errors.As(err, &ans) && ans.Code == http.StatusBadRequest:
		return loadError(err)
	}
	return failed(err)
}

// asJSON writes a value as programs like it.
func (a *app) asJSON(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// A table is rows of cells under headings, aligned, without padding at the end
// of a line.
type table struct {
	rows  [][]string
	right []bool // columns that are numbers
}

// newTable makes a table; headings that begin with '>' are of columns that are
// aligned to the right.
func newTable(headings ...string) *table {
	t := &table{}
	for i, h := range headings {
		rest, right := strings.CutPrefix(h, ">")
		headings[i] = rest
		t.right = append(t.right, right)
	}
	t.rows = [][]string{headings}
	return t
}

func (t *table) row(cells ...any) {
	r := make([]string, len(cells))
	for i, c := range cells {
		if r[i] = fmt.Sprint(c); r[i] == "" {
			r[i] = "-"
		}
	}
	t.rows = append(t.rows, r)
}

func (t *table) write(w io.Writer) error {
	var width []int
	for _, r := range t.rows {
		for i, c := range r {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	var b, line strings.Builder
	for _, r := range t.rows {
		line.Reset()
		for i, c := range r {
			space := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if i > 0 {
				line.WriteString("  ")
			}
			if i < len(t.right) && t.right[i] {
				line.WriteString(space + c)
			} else {
				line.WriteString(c + space)
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}
